"""noise[b, e] = normal number e % 4 of Philox4x32-10(key = seeds[b], counter = (e // 4, step)),
x_t = alpha x0 + sigma noise
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle2_fast.ops import _checks, _dispatch
from dalle2_fast.ops._dtypes import compute_dtype, per_sample

_LOW_32_BITS = 0xFFFFFFFF
# Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): multipliers and the
# Weyl increments of the key.
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85


def sample_noise(
    seeds: Tensor,  # int64 [B]
    step: int | Tensor,
    shape: Sequence[int],  # (B, *)
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [B, *]
    """Standard normal noise that depends on (seed, step, element) only, not on the batch or the device.

    Element e of sample b is normal number e % 4 of Philox4x32-10 with key seeds[b] and counter (e // 4,
    step); elements are counted in the order of a contiguous tensor. Box-Muller in float32 turns words into
    numbers.

    Args:
        seeds: int64 [B], one per sample; all 64 bits count.
        step: an int >= 0, or an int64 scalar tensor on the device of the noise.
        shape: shape of the noise; shape[0] = B is the number of seeds.
        device: device of the noise; None means the device of seeds.
        dtype: floating dtype of the noise. Every dtype gets the same numbers, rounded.

    Returns:
        [B, *] on `device`, in `dtype`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Example:
        >>> from dalle2_fast import functional
        >>> seeds = torch.tensor([7, 8])
        >>> noise = functional.sample_noise(seeds, step=0, shape=(2, 3, 4, 4))
        >>> noise.shape
        torch.Size([2, 3, 4, 4])
        >>> torch.equal(noise[1:], functional.sample_noise(seeds[1:], step=0, shape=(1, 3, 4, 4)))
        True
    """
    _check_sample_noise(seeds, shape, dtype)
    if device is not None:
        seeds = seeds.to(_checks.device("device", device))
    _checks.step_index(step, seeds)
    if _dispatch.use_reference("auto", torch.empty(0, dtype=dtype, device=seeds.device)):
        return sample_noise_reference(seeds, step, tuple(shape), dtype)
    return torch.ops.dalle2_fast.sample_noise(seeds, *tensor_or_number(step), tuple(shape), dtype)


def tensor_or_number(step: int | Tensor) -> tuple[Tensor | None, int]:
    """(tensor, 0) or (None, number): the fused ops take a step so that no number is sent to the device."""
    return (step, 0) if isinstance(step, Tensor) else (None, step)


def _check_sample_noise(seeds: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape: expected a sequence of sizes (B, ...), got {type(shape).__name__}")
    shape = tuple(shape)
    if not shape or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"shape: expected (B, ...) of sizes >= 0, got {shape}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype}")
    _checks.seeds("seeds", seeds, shape[0])


def sample_noise_reference(
    seeds: Tensor,  # int64 [B]
    step: int | Tensor,  # >= 0; a tensor is a scalar
    shape: tuple[int, ...],  # (B, *)
    dtype: torch.dtype,
) -> Tensor:  # [B, *] on the device of seeds
    """noise[b, 4 i + j] = normal number j of Philox4x32-10(key = seeds[b], counter = (i, step))"""
    maths = compute_dtype(dtype)
    batch = shape[0]
    elements = 1
    for size in shape[1:]:
        elements *= size
    blocks = torch.arange((elements + 3) // 4, device=seeds.device)[None]  # [1, blocks]
    if isinstance(step, Tensor):
        step = step.to(torch.int64).reshape(1, 1)
        step_low, step_high = step & _LOW_32_BITS, (step >> 32) & _LOW_32_BITS
    else:
        step_low = torch.full((1, 1), step & _LOW_32_BITS, dtype=torch.int64, device=seeds.device)
        step_high = torch.full((1, 1), step >> 32, dtype=torch.int64, device=seeds.device)
    seeds = seeds[:, None]
    words = philox_4x32_10(
        (blocks & _LOW_32_BITS, blocks >> 32, step_low, step_high),
        (seeds & _LOW_32_BITS, (seeds >> 32) & _LOW_32_BITS),
    )
    normals = box_muller(words[0], words[1], maths) + box_muller(words[2], words[3], maths)
    flat = torch.stack(normals, dim=-1).reshape(batch, blocks.shape[1] * 4)[:, :elements]
    return flat.reshape(shape).to(dtype)


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # four int64 tensors holding 32-bit words
    key: tuple[Tensor, Tensor],  # two int64 tensors holding 32-bit words
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # four int64 tensors holding 32-bit words
    """Philox4x32 with ten rounds. The six words may have any shapes that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # An int64 product wraps modulo 2^64, so its bits are those of the unsigned 64-bit product. The shift
        # copies the sign into the upper half; the mask after the exclusive or removes it.
        product0 = c0 * _PHILOX_M0
        product1 = c2 * _PHILOX_M1
        c0 = (product1 >> 32).bitwise_xor(c1).bitwise_xor(k0).bitwise_and(_LOW_32_BITS)
        c2 = (product0 >> 32).bitwise_xor(c3).bitwise_xor(k1).bitwise_and(_LOW_32_BITS)
        c1 = product1.bitwise_and(_LOW_32_BITS)
        c3 = product0.bitwise_and(_LOW_32_BITS)
        k0 = (k0 + _PHILOX_W0) & _LOW_32_BITS
        k1 = (k1 + _PHILOX_W1) & _LOW_32_BITS
    return c0, c1, c2, c3


def box_muller(word0: Tensor, word1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Box-Muller: two words -> two independent standard normal numbers."""
    # The uniform numbers are float32 for every dtype (u in (0, 1], the product is exact), so that a float64
    # run gets the same numbers as a float32 run. In float64 they would differ by the rounding of u.
    uniform0 = (word0.to(torch.float32) * 2.0**-32 + 2.0**-33).to(dtype)
    uniform1 = (word1.to(torch.float32) * 2.0**-32).to(dtype)
    radius = uniform0.log_().mul_(-2).sqrt_()
    angle = uniform1.mul_(6.283185307179586)
    return radius * angle.cos(), radius * angle.sin()


def add_noise(
    x0: Tensor,  # [B, *]
    alpha: Tensor,  # [B]
    sigma: Tensor,  # [B]
    noise: Tensor | None = None,  # [B, *]
    seeds: Tensor | None = None,  # int64 [B]
    step: int | Tensor = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # x_t, noise: [B, *]
    """The forward process of diffusion: x_t = alpha x0 + sigma noise.

    Args:
        x0: clean samples [B, *], floating.
        alpha: signal coefficient of each sample [B], floating.
        sigma: noise coefficient of each sample [B], floating.
        noise: standard normal noise [B, *]. Exactly one of noise and seeds is given.
        seeds: int64 [B]; the noise is then `sample_noise(seeds, step, x0.shape)`.
        step: step of the noise that seeds give: an int >= 0, or an int64 scalar tensor on the device of x0.
        impl: "auto", "reference" or "fused".

    Returns:
        x_t [B, *] in the dtype of x0, and the noise [B, *] that was added. The maths is float32 (float64 for
        a float64 x0).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device, or both or neither of noise and seeds
            are given.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Kingma et al., 2107.00630, equation 1.

    Example:
        >>> from dalle2_fast import functional
        >>> x0, alpha, sigma = torch.zeros(2, 3), torch.full((2,), 0.8), torch.full((2,), 0.6)
        >>> x_t, noise = functional.add_noise(x0, alpha, sigma, seeds=torch.tensor([7, 8]), step=0)
        >>> torch.equal(x_t, 0.6 * noise)
        True
    """
    _check_add_noise(x0, alpha, sigma, noise, seeds, step)
    if _dispatch.use_reference(impl, x0, noise, forward_mode=True):
        if noise is None:
            noise = sample_noise_reference(seeds, step, tuple(x0.shape), x0.dtype)
        return add_noise_reference(x0, alpha, sigma, noise), noise
    if noise is None:
        return _dispatch.kernel("add_drawn_noise")(x0, alpha, sigma, seeds, *tensor_or_number(step))
    return _dispatch.kernel("add_noise")(x0, alpha, sigma, noise), noise


def _check_add_noise(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    step: int | Tensor,
) -> None:
    _checks.floating("x0", x0)
    if x0.dim() < 1:
        raise ValueError(f"x0: expected [B, ...], got {tuple(x0.shape)}")
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        _checks.floating(name, value)
        _checks.shape(name, value, "B", x0.shape[:1])
        _checks.same_device(name, value, "x0", x0)
    if (noise is None) == (seeds is None):
        came = "neither" if noise is None else "both"
        raise ValueError(f"noise, seeds: expected exactly one of the two, got {came}")
    if noise is not None:
        _checks.floating("noise", noise)
        _checks.shape("noise", noise, "B, ...", x0.shape)
        _checks.same_device("noise", noise, "x0", x0)
    else:
        _checks.seeds("seeds", seeds, x0.shape[0])
        _checks.same_device("seeds", seeds, "x0", x0)
    _checks.step_index(step, x0)


def add_noise_reference(
    x0: Tensor,  # [B, *]
    alpha: Tensor,  # [B]
    sigma: Tensor,  # [B]
    noise: Tensor,  # [B, *]
) -> Tensor:  # [B, *], dtype of x0
    """x_t = alpha x0 + sigma noise"""
    dtype = compute_dtype(x0.dtype)
    signal = per_sample(alpha.to(dtype), x0) * x0.to(dtype)
    return torch.addcmul(signal, per_sample(sigma.to(dtype), x0), noise.to(dtype)).to(x0.dtype)
