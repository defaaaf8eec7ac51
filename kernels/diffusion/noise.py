"""x_t = alpha x0 + sigma noise, and noise(seed, step) alone: element e of a sample gets number e of Philox.

One launch each. Bytes per element in bfloat16: 6, for reading x0, storing x_t, and reading the noise (given)
or storing it (drawn). Noise alone: 2 bytes; its time is that of 40 instructions per number, not of the
memory.

The numbers are those of reference.sample_noise: they depend on (seed, step, element) and not on the launch.
They are rounded to the dtype of x0 before use, because the network learns to predict the rounded noise.

The op takes float32, bfloat16 and float16; the maths is float32, and autocast does not change it. x_t and
drawn noise have the dtype and memory format of x0. The gradient of x_t is written in torch: in training x0
and the noise are data, so it is rarely needed.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._math import philox_normal
from .._op import define, differentiate
from .._planes import arrange, check_size, count_tiles, memory_format, tile_config


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


def _like(x0: Tensor) -> Tensor:
    return torch.empty_like(x0, memory_format=memory_format(x0))


def _add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    x_t = _like(x0)
    _launch(x0, alpha, sigma, noise, x_t, None, None, 0)
    return x_t


def _add_drawn_noise(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seeds: Tensor, step: Tensor | None, step_number: int
) -> tuple[Tensor, Tensor]:
    x_t, noise = _like(x0), _like(x0)
    _launch(x0, alpha, sigma, noise, x_t, seeds, step, step_number)
    return x_t, noise


def _sample_noise(
    seeds: Tensor, step: Tensor | None, step_number: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    noise = _fake_sample_noise(seeds, step, step_number, shape, dtype)
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


def _fake_sample_noise(seeds, step, step_number, shape, dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=seeds.device)


sample_noise = define(
    "sample_noise(Tensor seeds, Tensor? step, int step_number, SymInt[] shape, ScalarType dtype) -> Tensor",
    run=_sample_noise,
    fake=_fake_sample_noise,
)
add_noise = define(
    "add_noise(Tensor x0, Tensor alpha, Tensor sigma, Tensor noise) -> Tensor",
    run=_add_noise,
    fake=lambda x0, *_: _like(x0),
)
add_drawn_noise = define(
    "add_drawn_noise(Tensor x0, Tensor alpha, Tensor sigma, Tensor seeds, Tensor? step, int step_number)"
    " -> (Tensor, Tensor)",
    run=_add_drawn_noise,
    fake=lambda x0, *_: (_like(x0), _like(x0)),
)


def _gradients(ctx, grad: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> tuple:
    """Gradients of x0, alpha, sigma and noise, or None if not needed. Products and sums are float32."""
    grad, per_sample = grad.to(torch.float32), (-1,) + (1,) * (x0.dim() - 1)

    def scaled(factor: Tensor, like: Tensor) -> Tensor:
        return (grad * factor.to(torch.float32).reshape(per_sample)).to(like.dtype)

    def summed(value: Tensor, like: Tensor) -> Tensor:
        # Not -1: it is ambiguous where the batch is empty.
        return (grad * value).reshape(value.shape[0], math.prod(value.shape[1:])).sum(1).to(like.dtype)

    # The fourth input is the noise, or the seeds, which need no gradient.
    needs_x0, needs_alpha, needs_sigma, needs_noise, *_ = ctx.needs_input_grad
    return (
        scaled(alpha, x0) if needs_x0 else None,
        summed(x0, alpha) if needs_alpha else None,
        summed(noise, sigma) if needs_sigma else None,
        scaled(sigma, noise) if needs_noise else None,
    )


def _save_given(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _save_drawn(ctx, inputs, output) -> None:
    x_t, noise = output
    ctx.mark_non_differentiable(noise)
    ctx.save_for_backward(*inputs[:3], noise)


def _backward_drawn(ctx, grad: Tensor, grad_noise: Tensor | None) -> tuple:
    return *_gradients(ctx, grad, *ctx.saved_tensors), None, None


differentiate(
    add_noise, save=_save_given, backward=lambda ctx, grad: _gradients(ctx, grad, *ctx.saved_tensors)
)
differentiate(add_drawn_noise, save=_save_drawn, backward=_backward_drawn)
