"""x_t = alpha x0 + sigma noise, and noise(seed, step) alone: element e of a sample gets number e of Philox.

One launch each. Bytes per element in bfloat16: 6, for reading x0, storing x_t, and reading the noise (given)
or storing it (drawn). Noise alone: 2 bytes; its time is that of 40 instructions per number, not of the
memory.

The numbers are those of reference.sample_noise: they depend on (seed, step, element) and not on the launch.
They are rounded to the dtype of x0 before use, because the network learns to predict the rounded noise.

The op takes float32, bfloat16 and float16; the maths is float32, and autocast does not change it. x_t and
drawn noise have the dtype and memory format of x0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._math import philox_normal
from .._op import implement
from .._planes import arrange, check_size, count_tiles, tile_config
from .op import add_drawn_noise, add_noise, empty_noise, empty_result, sample_noise


@triton.jit(do_not_specialize=["step", "tiles"])
def _sample_noise_kernel(noise_ptr, seeds_ptr, step_ptr, step, elements, tiles, SIZE: tl.constexpr):
    """noise_ptr: out, [B, elements]. step_ptr: scalar, or None: then `step`."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    if step_ptr is not None:
        step = tl.load(step_ptr)
    first = tl.program_id(0) % tiles * SIZE
    element = first + tl.arange(0, SIZE)
    noise = philox_normal(tl.load(seeds_ptr + sample), step.to(tl.int64), first, SIZE)
    noise = noise.to(noise_ptr.dtype.element_ty)
    tl.store(noise_ptr + sample * elements + element, noise, mask=element < elements)


@triton.jit(do_not_specialize=["step", "tiles"])
def _add_noise_kernel(
    x0_ptr,  # [B, C, *]
    alpha_ptr,  # [B]
    sigma_ptr,  # [B]
    noise_ptr,  # [B, C, *]: read, or written if seeds_ptr is given
    x_t_ptr,  # out: [B, C, *]
    seeds_ptr,  # [B], or None
    step_ptr,  # scalar, or None: then `step`
    step,
    channels,
    positions,
    tiles,  # per channel
    x0_sample,
    x0_channel,
    x0_position,
    noise_sample,
    noise_channel,
    noise_position,
    x_t_sample,
    x_t_channel,
    x_t_position,
    SIZE: tl.constexpr,
):
    """A program takes SIZE positions of every channel, so that it reads each sector of channels_last once."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    alpha = tl.load(alpha_ptr + sample)
    sigma = tl.load(sigma_ptr + sample)
    if seeds_ptr is not None:
        seed = tl.load(seeds_ptr + sample)
        if step_ptr is not None:
            step = tl.load(step_ptr)
        step = step.to(tl.int64)
    for index in range(channels):
        channel = sample * 0 + index  # int64, in the interpreter too
        # Tiles begin at a multiple of four elements of the sample, as blocks of Philox do.
        before = index * positions
        first = before // 4 * 4 + tile * SIZE
        position = first - before + tl.arange(0, SIZE)
        inside = (position >= 0) & (position < positions)
        position = position.to(tl.int64)
        at = sample * x0_sample + channel * x0_channel + position * x0_position
        x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at = sample * noise_sample + channel * noise_channel + position * noise_position
        if seeds_ptr is not None:
            noise = philox_normal(seed, step, first, SIZE).to(noise_ptr.dtype.element_ty)
            tl.store(noise_ptr + at, noise, mask=inside)
        else:
            noise = tl.load(noise_ptr + at, mask=inside, other=0.0)
        x_t = alpha * x0 + sigma * noise.to(tl.float32)
        at = sample * x_t_sample + channel * x_t_channel + position * x_t_position
        tl.store(x_t_ptr + at, x_t.to(x_t_ptr.dtype.element_ty), mask=inside)


def _launch(x0, alpha, sigma, noise, x_t, seeds, step, step_number) -> None:
    if x0.numel() == 0:
        return
    check_size("x0", x0)
    (x0, noise, x_t), (channels, positions, strides) = arrange([x0, noise, x_t])
    size, warps = tile_config(positions)
    tiles = count_tiles(channels, positions, size)
    with torch.cuda.device_of(x0):
        _add_noise_kernel[(x0.shape[0] * tiles,)](
            x0, alpha.to(torch.float32).contiguous(), sigma.to(torch.float32).contiguous(), noise, x_t,
            None if seeds is None else seeds.contiguous(), step, step_number, channels, positions, tiles,
            *strides[0], *strides[1], *strides[2], SIZE=size, num_warps=warps,
        )  # fmt: skip


def _add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    x_t = empty_result(x0)
    _launch(x0, alpha, sigma, noise, x_t, None, None, 0)
    return x_t


def _add_drawn_noise(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seeds: Tensor, step: Tensor | None, step_number: int
) -> tuple[Tensor, Tensor]:
    x_t, noise = empty_result(x0), empty_result(x0)
    _launch(x0, alpha, sigma, noise, x_t, seeds, step, step_number)
    return x_t, noise


def _sample_noise(
    seeds: Tensor, step: Tensor | None, step_number: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    noise = empty_noise(seeds, step, step_number, shape, dtype)
    if noise.numel() == 0:
        return noise
    check_size("shape", noise)
    elements = noise.numel() // shape[0]
    size, warps = tile_config(elements)
    tiles = triton.cdiv(elements, size)
    with torch.cuda.device_of(noise):
        _sample_noise_kernel[(shape[0] * tiles,)](
            noise, seeds.contiguous(), step, step_number, elements, tiles, SIZE=size, num_warps=warps
        )
    return noise


implement(sample_noise, _sample_noise)
implement(add_noise, _add_noise)
implement(add_drawn_noise, _add_drawn_noise)
