"""x_next = a x + b x0 + c previous_x0 + std noise(seed, step),  x0 = clip(predict(x, guide(model_output)))

One launch. Dynamic thresholding and guidance rescale need a launch before it, which computes the statistics
of each sample (_statistics.py). Coefficients, step, guidance and seeds stay on the device: nothing waits for
it, and one CUDA graph serves every step.

Bytes per element in bfloat16: 2 each for reading x, the output, its unconditional rows, the learned range (of
the conditional rows only) and previous_x0, and for storing x_next and x0. B64 3x256x256 with guidance: 10, in
all 126 MB.

A sample does not depend on the others of its batch: one program computes its statistics, in a fixed order,
and the noise depends on (seed, step, element), where elements are counted as in a contiguous tensor.

The op takes float32, bfloat16 and float16, also mixed. The maths is float32, autocast does not change it, and
the results have the dtype and memory format of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._math import philox_normal
from .._op import implement
from .._planes import arrange, check_size, count_tiles, tile_config
from . import noise as add_noise  # noqa: F401  also implements the ops of noise.py
from ._statistics import UNGUIDED, Guidance, Row, coefficient, guide, predict_x0, sample_statistics
from .op import diffusion_step, empty_result


@triton.jit
def _clamp(x0, limit):
    """x0 clamped to [-limit, limit]; NaN stays NaN, as in torch."""
    x0 = tl.maximum(x0, -limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x0, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["step", "steps", "batch", "tiles"])
def _step_kernel(
    x_ptr,  # [B, C, *]
    output_ptr,  # [B or 2B, C or 2C, *]
    previous_ptr,  # [B, C, *] or None
    next_ptr,  # out: [B, C, *]
    x0_ptr,  # out: as next_ptr
    table_ptr,  # [steps, 8]
    step_ptr,  # scalar, or None: then `step`
    step,
    steps,  # rows of the table
    seeds_ptr,  # [B] or None
    guidance_ptr,  # [B] or scalar, or None: then `guidance`
    guidance,
    guidance_stride,
    statistics_ptr,  # [B, 2] or None
    bound,  # of |x0|, or None
    batch,
    channels,
    positions,
    tiles,  # per channel
    x_sample,
    x_channel,
    x_position,
    output_sample,
    output_channel,
    output_position,
    previous_sample,
    previous_channel,
    previous_position,
    next_sample,
    next_channel,
    next_position,
    variance_offset,  # from a conditional output to its variance logit (learned range), or None
    PREDICTION: tl.constexpr,
    GUIDED: tl.constexpr,
    RESCALE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A program takes SIZE positions of every channel, so that it reads each sector of channels_last once."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if step_ptr is not None:
        step = tl.load(step_ptr)
    step = step.to(tl.int64)
    alpha = coefficient(table_ptr, step, steps, 0)
    sigma = coefficient(table_ptr, step, steps, 1)
    a = coefficient(table_ptr, step, steps, 2)
    b = coefficient(table_ptr, step, steps, 3)
    c = coefficient(table_ptr, step, steps, 4)
    std = coefficient(table_ptr, step, steps, 5)
    inverse_alpha = 1.0 / alpha
    if guidance_ptr is not None:
        guidance = tl.load(guidance_ptr + sample * guidance_stride)
    if RESCALE:
        factor = tl.load(statistics_ptr + 2 * sample)
    if DYNAMIC:
        limit = tl.load(statistics_ptr + 2 * sample + 1)
        shrink = bound / limit

    for index in range(channels):
        channel = sample * 0 + index  # int64, in the interpreter too
        # Tiles begin at a multiple of four elements of the sample, as blocks of Philox do.
        first = index * positions
        element = first // 4 * 4 + tile * SIZE
        position = element - first + tl.arange(0, SIZE)
        inside = (position >= 0) & (position < positions)
        at = sample * x_sample + channel * x_channel + position.to(tl.int64) * x_position
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at = channel * output_channel + position.to(tl.int64) * output_position
        unconditional_ptr = output_ptr + (sample + batch) * output_sample + at
        at += sample * output_sample
        output = tl.load(output_ptr + at, mask=inside, other=0.0).to(tl.float32)
        output = guide(output, unconditional_ptr, inside, guidance, GUIDED)
        if RESCALE:
            output *= factor

        x0 = predict_x0(x, output, alpha, inverse_alpha, sigma, PREDICTION)
        if DYNAMIC:
            x0 = _clamp(x0, limit) * shrink
        elif bound is not None:
            x0 = _clamp(x0, bound)

        previous = x0
        if previous_ptr is not None:
            before = sample * previous_sample + channel * previous_channel
            before += position.to(tl.int64) * previous_position
            previous = tl.load(previous_ptr + before, mask=inside, other=0.0).to(tl.float32)
        x_next = a * x + (b * x0 + c * previous)
        if seeds_ptr is not None:
            noise = philox_normal(tl.load(seeds_ptr + sample), step, element, SIZE)
            if variance_offset is not None:
                fraction = tl.load(output_ptr + variance_offset + at, mask=inside, other=0.0).to(tl.float32)
                fraction = (fraction + 1.0) * 0.5
                log_var_min = coefficient(table_ptr, step, steps, 6)
                log_var_max = coefficient(table_ptr, step, steps, 7)
                log_var = fraction * log_var_max + (1.0 - fraction) * log_var_min
                noise *= tl.where(std > 0.0, tl.exp(0.5 * log_var), 0.0)
            else:
                noise *= std
            x_next += noise

        at = sample * next_sample + channel * next_channel
        at += position.to(tl.int64) * next_position
        tl.store(next_ptr + at, x_next.to(next_ptr.dtype.element_ty), mask=inside)
        tl.store(x0_ptr + at, x0.to(x0_ptr.dtype.element_ty), mask=inside)


def _diffusion_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: Tensor | None,
    step_number: int,
    seeds: Tensor | None,
    guidance: Tensor | None,
    guidance_number: float | None,
    guidance_rescale: float,
    prediction: str,
    clip: float | None,
    dynamic_threshold: float | None,
    learned_range: bool,
    previous_x0: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x_next, x0 = empty_result(x), empty_result(x)
    if x.numel() == 0:
        return x_next, x0
    check_size("x", x)
    batch = x.shape[0]
    (x, model_output, previous_x0, _), planes = arrange([x, model_output, previous_x0, x_next])
    channels, positions, strides = planes
    variance_offset = channels * strides[1][1] if learned_range and seeds is not None else None
    seeds = None if seeds is None else seeds.contiguous()
    row = Row(table.to(torch.float32).contiguous(), step, step_number, table.shape[0])
    guided = _guidance(guidance, guidance_number)
    rescale, dynamic = guidance_rescale > 0, dynamic_threshold is not None
    bound = 1.0 if dynamic and clip is None else clip
    size, warps = tile_config(positions)
    tiles = count_tiles(channels, positions, size)

    with torch.cuda.device_of(x):
        statistics = None
        if rescale or dynamic:
            statistics = sample_statistics(
                x,
                model_output,
                planes,
                row,
                guidance=guided,
                guidance_rescale=guidance_rescale,
                prediction=prediction,
                quantile=dynamic_threshold,
                bound=bound or 0.0,
            )
        _step_kernel[(batch * tiles,)](
            x, model_output, previous_x0, x_next, x0, *row, seeds, *(guided or UNGUIDED), statistics, bound,
            batch, channels, positions, tiles, *strides[0], *strides[1], *strides[2], *strides[3],
            variance_offset, PREDICTION=prediction, GUIDED=guided is not None, RESCALE=rescale,
            DYNAMIC=dynamic, SIZE=size, num_warps=warps,
        )  # fmt: skip
    return x_next, x0


def _guidance(weight: Tensor | None, number: float | None) -> Guidance | None:
    if weight is not None:
        return Guidance(weight.to(torch.float32).contiguous(), 0.0, 1 if weight.dim() > 0 else 0)
    return None if number is None else Guidance(None, number, 0)


implement(diffusion_step, _diffusion_step)
