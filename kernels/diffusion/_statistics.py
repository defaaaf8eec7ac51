"""factor = r std(conditional) / std(guided) + 1 - r       (Lin et al., 2305.08891, equations 15 and 16)
limit = max(quantile_p |x0|, bound)                        (Saharia et al., 2205.11487, section 2.3)

Statistics of each sample that its diffusion step needs: the factor of the guidance rescale, and the limit of
|x0|. One launch with one program per sample, in a fixed order: a sample does not depend on the others of its
batch. Standard deviations take two passes over a tile, and tiles are merged by their counts (Chan et al.).
The quantile is exact and is interpolated as in torch.quantile. Bytes: what the step reads, for each of the
two statistics. A sample that is too large for registers (more than 16384 elements) takes a few per cent more,
for the subset that narrows the search.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._math import merge_moments
from .._planes import Planes
from ._select import LARGEST, select, select_listed, select_two


@triton.jit
def coefficient(table_ptr, step, steps, column: tl.constexpr):
    """table[step, column]; NaN for a step on the device that is no row of the table, so that it is seen"""
    is_row = (step >= 0) & (step < steps)
    return tl.load(table_ptr + step * 8 + column, mask=is_row, other=float("nan")).to(tl.float32)


@triton.jit
def guide(conditional, unconditional_ptr, inside, guidance, GUIDED: tl.constexpr):
    """unconditional + guidance (conditional - unconditional)"""
    if GUIDED:
        unconditional = tl.load(unconditional_ptr, mask=inside, other=0.0).to(tl.float32)
        return unconditional + guidance * (conditional - unconditional)
    return conditional


@triton.jit
def predict_x0(x, output, alpha, inverse_alpha, sigma, PREDICTION: tl.constexpr):
    """x0 from what the network predicts, where x = alpha x0 + sigma epsilon"""
    if PREDICTION == "epsilon":
        return (x - sigma * output) * inverse_alpha
    if PREDICTION == "v_prediction":
        return alpha * x - sigma * output
    return output


@triton.jit(do_not_specialize=["step", "steps", "batch", "rank", "rank_low", "rank_high"])
def _statistics_kernel(
    x_ptr,  # [B, C, *]
    output_ptr,  # [B or 2B, C or more, *]
    table_ptr,  # [steps, 8]
    step_ptr,  # scalar, or None: then `step`
    step,
    steps,  # rows of the table
    guidance_ptr,  # [B] or scalar, or None: then `guidance`
    guidance,
    guidance_stride,
    statistics_ptr,  # out: [B, 2], the factor of the guided output and the limit of |x0|
    list_ptr,  # [B, elements], scratch
    batch,
    channels,
    positions,
    x_sample,
    x_channel,
    x_position,
    output_sample,
    output_channel,
    output_position,
    guidance_rescale,
    bound,
    rank,  # the quantile lies between the element of |x0| with this rank and the next one,
    weight,  # at this fraction of their distance
    rank_low,  # ranks in the subset, which bound the search
    rank_high,
    PREDICTION: tl.constexpr,
    GUIDED: tl.constexpr,
    RESCALE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    RESIDENT: tl.constexpr,  # a sample fits one tile
    TILE: tl.constexpr,
    SUBSET: tl.constexpr,
):
    """One program per sample.

    A sample that fits stays in registers and is searched there. For a larger one, a quasi-random subset first
    gives bounds for the key of the wanted rank. One pass over the sample counts the keys below the bounds and
    lists those within them (1 % of the sample for p = 0.995), and the list is searched. If the bounds miss
    the rank, a second pass lists all keys, so the quantile is always exact (Floyd and Rivest 1975, with radix
    select).
    """
    sample = tl.program_id(0).to(tl.int64)
    if step_ptr is not None:
        step = tl.load(step_ptr)
    step = step.to(tl.int64)
    alpha = coefficient(table_ptr, step, steps, 0)
    sigma = coefficient(table_ptr, step, steps, 1)
    inverse_alpha = 1.0 / alpha
    if guidance_ptr is not None:
        guidance = tl.load(guidance_ptr + sample * guidance_stride)
    x_ptr += sample * x_sample
    unconditional_ptr = output_ptr + (sample + batch) * output_sample
    output_ptr += sample * output_sample
    lane = tl.arange(0, TILE)
    zero = sample * 0  # plus a loop's index: int64, in the interpreter too

    factor = 1.0
    if RESCALE:
        count = 0.0
        mean = 0.0
        squares = 0.0
        guided_mean = 0.0
        guided_squares = 0.0
        for channel in range(channels):
            for start in range(0, positions, TILE):
                inside = start + lane < positions
                number = tl.minimum(positions - start, TILE).to(tl.float32)
                at = (zero + channel) * output_channel + (start + lane).to(tl.int64) * output_position
                conditional = tl.load(output_ptr + at, mask=inside, other=0.0).to(tl.float32)
                guided = guide(conditional, unconditional_ptr + at, inside, guidance, GUIDED)
                new_mean = tl.sum(conditional) / number
                new_guided_mean = tl.sum(guided) / number
                conditional = tl.where(inside, conditional - new_mean, 0.0)
                guided = tl.where(inside, guided - new_guided_mean, 0.0)
                _, guided_mean, guided_squares = merge_moments(
                    count, guided_mean, guided_squares, number, new_guided_mean, tl.sum(guided * guided)
                )
                count, mean, squares = merge_moments(
                    count, mean, squares, number, new_mean, tl.sum(conditional * conditional)
                )
        deviation = tl.sqrt(guided_squares / (count - 1.0))
        ratio = tl.sqrt(squares / (count - 1.0)) / tl.maximum(deviation, 1.1754943508222875e-38)
        factor = guidance_rescale * ratio + (1.0 - guidance_rescale)
        tl.store(statistics_ptr + 2 * sample, factor)

    if DYNAMIC:
        if RESIDENT:
            element = lane
            channel = element // positions
            position = element - channel * positions
            inside = channel < channels
            keys = _keys(
                x_ptr, output_ptr, unconditional_ptr, channel, position, x_channel, x_position,
                output_channel, output_position, inside, guidance, factor, alpha, inverse_alpha, sigma,
                PREDICTION, GUIDED,
            )  # fmt: skip
            value = select(keys, rank)
            not_above = tl.sum((keys <= value).to(tl.int32))
            above = tl.min(tl.where(keys > value, keys, LARGEST))
            following = tl.where(not_above > rank + 1, value, above)
        else:
            # A Weyl sequence: evenly spread over rows, columns and channels, for every image size.
            spread = (tl.arange(0, SUBSET).to(tl.uint64) * 0x9E3779B9) & 0xFFFFFFFF
            element = ((spread * (channels * positions).to(tl.uint64)) >> 32).to(tl.int32)
            subset_channel = element // positions
            subset_position = element - subset_channel * positions
            subset = _keys(
                x_ptr, output_ptr, unconditional_ptr, subset_channel, subset_position, x_channel, x_position,
                output_channel, output_position, element >= 0, guidance, factor, alpha, inverse_alpha, sigma,
                PREDICTION, GUIDED,
            )  # fmt: skip
            low, high = select_two(subset, rank_low, rank_high)
            list_ptr += sample * (channels * positions)
            below = rank * 0
            listed = rank * 0
            missed = rank * 0 + 1
            while missed > 0:
                below = rank * 0
                listed = rank * 0
                for channel in range(channels):
                    for start in range(0, positions, TILE):
                        position = start + lane
                        inside = position < positions
                        keys = _keys(
                            x_ptr, output_ptr, unconditional_ptr, zero + channel, position, x_channel,
                            x_position, output_channel, output_position, inside, guidance, factor, alpha,
                            inverse_alpha, sigma, PREDICTION, GUIDED,
                        )  # fmt: skip
                        chosen = (inside & (keys >= low) & (keys <= high)).to(tl.int32)
                        slot = listed + tl.cumsum(chosen, axis=0) - 1
                        tl.store(list_ptr + slot, keys, mask=chosen > 0)
                        counts = tl.sum(chosen + ((keys < low).to(tl.int32) << 16))
                        listed += counts & 0xFFFF
                        below += counts >> 16
                # Both ranks are in the list, or the first is and has no successor.
                end = below + listed
                found = (below <= rank) & ((rank + 1 < end) | (end == channels * positions))
                missed = tl.where(found, 0, 1)
                if missed > 0:
                    low = rank * 0
                    high = rank * 0 + LARGEST
            tl.debug_barrier()  # threads read what other threads have written to the list
            value, following = select_listed(list_ptr, listed, rank - below, low, high, TILE)
        # As torch.lerp, which stays between its two ends.
        lower = value.to(tl.float32, bitcast=True)
        upper = following.to(tl.float32, bitcast=True)
        difference = upper - lower
        between = tl.where(weight < 0.5, lower + weight * difference, upper - (1.0 - weight) * difference)
        quantile = tl.where(weight > 0.0, between, lower)
        limit = tl.maximum(quantile, bound, propagate_nan=tl.PropagateNan.ALL)
        tl.store(statistics_ptr + 2 * sample + 1, limit)


@triton.jit
def _keys(
    x_ptr, output_ptr, unconditional_ptr, channel, position, x_channel, x_position, output_channel,
    output_position, inside, guidance, factor, alpha, inverse_alpha, sigma, PREDICTION: tl.constexpr,
    GUIDED: tl.constexpr,
):  # fmt: skip
    """The bits of |x0| before clipping, and LARGEST for elements that do not exist."""
    at = channel.to(tl.int64) * output_channel + position.to(tl.int64) * output_position
    output = tl.load(output_ptr + at, mask=inside, other=0.0).to(tl.float32)
    output = guide(output, unconditional_ptr + at, inside, guidance, GUIDED) * factor
    x = output
    if PREDICTION != "sample":
        at = channel.to(tl.int64) * x_channel + position.to(tl.int64) * x_position
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x0 = predict_x0(x, output, alpha, inverse_alpha, sigma, PREDICTION)
    return tl.where(inside, x0.to(tl.int32, bitcast=True) & LARGEST, LARGEST)


# Keys of a program that stay in registers: 32 per thread of 16 warps.
_RESIDENT_KEYS = 16384
_SUBSET_KEYS = 4096


def _config(elements: int) -> tuple[bool, int, int]:
    """(RESIDENT, TILE, warps) for samples with this number of elements.

    Resident: the sample is one tile, with at most 32 keys per thread. Otherwise tiles have 32 keys per
    thread: on an H200 64 samples of 3x256x256 take 237 us, and 247 us with 16. The batch size has no
    influence.
    """
    if elements <= _RESIDENT_KEYS:
        tile = max(128, triton.next_power_of_2(elements))
        return True, tile, min(16, max(1, tile // 512))
    return False, 8192, 8


def _ranks(quantile: float, elements: int) -> tuple[int, float, int, int]:
    """(rank, weight) of the quantile among the elements, and (low, high) ranks of the subset around it.

    In a subset of m keys the rank of the p-quantile has a standard deviation of sqrt(m p (1 - p)). A margin
    of five standard deviations and 4 ranks on either side misses once in millions of samples, which costs
    time but no accuracy.
    """
    position = quantile * (elements - 1)
    rank = min(int(position), elements - 1)
    middle = quantile * _SUBSET_KEYS
    margin = 4 + 5 * math.sqrt(middle * (1 - quantile))
    low, high = max(-1, math.floor(middle - margin)), min(_SUBSET_KEYS, math.ceil(middle + margin))
    return rank, (position - rank if rank + 1 < elements else 0.0), low, high


class Row(NamedTuple):
    """The row of a sampler's table, as kernels take it. The step is a scalar on the device or a number."""

    table: Tensor  # float32 [steps, 8]
    step: Tensor | None
    number: int
    steps: int  # rows of the table


class Guidance(NamedTuple):
    """The guidance, as kernels take it: a tensor on the device or, where that is None, a number."""

    weight: Tensor | None  # float32 [B] or scalar
    number: float
    stride: int  # 0 for a scalar


UNGUIDED = Guidance(None, 0.0, 0)


def sample_statistics(
    x: Tensor,  # [B, C, *]
    output: Tensor,  # [B or 2B, C or 2C, *]
    planes: Planes,  # of x and output, in this order
    row: Row,
    *,
    guidance: Guidance | None,
    guidance_rescale: float,
    prediction: str,
    quantile: float | None,
    bound: float,
) -> Tensor:  # float32 [B, 2]: factor and limit; one that is not asked for is not initialised
    batch, elements = x.shape[0], planes.channels * planes.positions
    statistics = torch.empty(batch, 2, dtype=torch.float32, device=x.device)
    resident, tile, warps = _config(elements)
    ranks = _ranks(1.0 if quantile is None else quantile, elements)
    listed = None
    if quantile is not None and not resident:
        listed = torch.empty(batch, elements, dtype=torch.int32, device=x.device)
    _statistics_kernel[(batch,)](
        x, output, *row, *(guidance or UNGUIDED), statistics, listed, batch, planes.channels,
        planes.positions, *planes.strides[0], *planes.strides[1], guidance_rescale, bound, *ranks,
        PREDICTION=prediction, GUIDED=guidance is not None, RESCALE=guidance_rescale > 0,
        DYNAMIC=quantile is not None, RESIDENT=resident, TILE=tile, SUBSET=_SUBSET_KEYS, num_warps=warps,
    )  # fmt: skip
    return statistics
