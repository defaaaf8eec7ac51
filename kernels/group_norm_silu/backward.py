"""dx = rstd (g dz - m1 - xhat m2), dz = dy act'(g xhat + o), m1, m2 = means over the group of g dz, g dz xhat

g = weight (1 + scale), o = bias (1 + scale) + shift, xhat = (x - mean) rstd. All other gradients follow from
two sums per sample and channel over the positions, S1 = sum dz and S2 = sum dz xhat:

    dshift = S1, dscale = weight S2 + bias S1, dweight = sum_n (1 + scale) S2, dbias = sum_n (1 + scale) S1

Only x, mean and rstd are saved by the forward pass; the activation is recomputed. Each sum has one writer and
a fixed order: there are no atomics, and equal calls give equal bits. dy is read in place, for all strides.

Bytes per element in bfloat16: 6. A program that does not hold its slab in registers reads 4 of them a second
time: from L1 or L2, or from L2 or memory where the slab is cut into chunks. Launches: 1, or 2 with chunks,
and 1 for the gradients of the parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._op import implement
from . import _plan as plan
from ._backward_chunks import input_gradient_kernel, sums_kernel
from ._backward_whole import (
    looped_backward_kernel,
    resident_backward_kernel,
)
from .op import empty_gradients, group_norm_silu_backward

# ---------------------------------------------------------------------------------------- parameter gradients


@triton.jit(do_not_specialize=plan.VARYING)
def _parameters_kernel(
    sums, weight, bias, scale, dweight, dbias, dscale, dshift,  # [2, N, C], then [C], [C], [N, C], ...
    scale_stride, samples, channels,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program sums some channels over all samples, in the order of the samples."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    gain = tl.full([CHANNELS], 1.0, tl.float32)
    offset = tl.zeros([CHANNELS], tl.float32)
    if weight is not None:
        gain = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    sum_stride = samples.to(tl.int64) * channels
    total1 = tl.zeros([SAMPLES, CHANNELS], tl.float32)
    total2 = tl.zeros([SAMPLES, CHANNELS], tl.float32)
    for first in range(0, samples, SAMPLES):
        sample = (first + tl.arange(0, SAMPLES)).to(tl.int64)
        inside = (sample < samples)[:, None] & exists[None, :]
        at = sample[:, None] * channels + channel[None, :]
        sum1 = tl.load(sums + at, mask=inside, other=0.0)
        sum2 = tl.load(sums + sum_stride + at, mask=inside, other=0.0)
        if dshift is not None:
            tl.store(dshift + at, sum1.to(dshift.dtype.element_ty), mask=inside)
        if dscale is not None:
            value = gain[None, :] * sum2 + offset[None, :] * sum1
            tl.store(dscale + at, value.to(dscale.dtype.element_ty), mask=inside)
        if scale is not None:
            at = sample[:, None] * scale_stride + channel[None, :]
            factor = 1.0 + tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
            sum1 *= factor
            sum2 *= factor
        total1 += sum1
        total2 += sum2
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(total2, axis=0).to(dweight.dtype.element_ty), mask=exists)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(total1, axis=0).to(dbias.dtype.element_ty), mask=exists)


# ----------------------------------------------------------------------------------------------------- launch


def _backward(
    dy: Tensor,  # [N, C, *]
    x: Tensor,  # [N, C, *]
    mean: Tensor,  # [N, G]
    rstd: Tensor,  # [N, G]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    scale: Tensor | None,  # [N, C]
    shift: Tensor | None,  # [N, C]
    silu: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx in the memory format of x, and the gradients of weight, bias, scale and shift.

    A gradient has no elements if its tensor is None or `parameters` is False.
    """
    gradients = empty_gradients(x, weight, bias, scale, shift, parameters)
    if x.numel() == 0:
        for gradient in gradients[1:]:
            gradient.zero_()
        return gradients
    dx = gradients[0]
    weight, bias, scale, shift = (plan.rows(value) for value in (weight, bias, scale, shift))
    samples, channels = x.shape[:2]
    with torch.cuda.device_of(x):
        sums = mean.new_empty((2, samples, channels))
        _input_gradient(dy, x, mean, rstd, dx, sums, weight, bias, scale, shift, silu)
        if any(gradient.numel() for gradient in gradients[1:]):
            outputs = (gradient if gradient.numel() else None for gradient in gradients[1:])
            _parameters_kernel[(plan.divide_up(channels, 16),)](
                sums, weight, bias, scale, *outputs,
                plan.row_stride(scale), samples, channels,
                SAMPLES=32, CHANNELS=16, num_warps=4,  # rows of 64 bytes, 4 values per thread
            )  # fmt: skip
    return gradients


class Pair(NamedTuple):
    """x and another tensor of its shape (dy; the tangent of x in tangent.py), as the kernels read them."""

    other: Tensor
    source: plan.View
    shape: tuple[int, int, int, bool, int]  # as _plan.py takes it
    strides: tuple[int, int]  # of channels and positions of x
    other_strides: tuple[int, ...]
    transposed: bool  # the channels of `other` are adjacent, and the positions of x
    constants: dict[str, int]

    def looped_tiles(self) -> plan.Tiles | None:
        """Tiles for a program that reads its slabs of both tensors twice, or None if these are too large."""
        tiles = plan.chunk_tiles(*self.shape, plan.LOOPED_LANES, plan.LOOPED_WARPS, self.transposed)
        width, _, positions, _, itemsize = self.shape
        return tiles if 2 * tiles.groups * width * positions * itemsize <= plan.LOOPED_BYTES else None


def arrange_pair(other: Tensor, x: Tensor, groups: int) -> Pair:
    source = plan.view(x)
    dimensions = plan.position_dimensions(other)
    if dimensions is None:
        other = other.contiguous()
        dimensions = plan.position_dimensions(other)
    (size0, stride0), (size1, stride1), (_, stride2) = (*dimensions, (1, 0), (1, 0))[:3]
    channels = x.shape[1]
    width = channels // groups
    reach = sum((size - 1) * stride for size, stride in zip(other.shape[1:], other.stride()[1:], strict=True))
    return Pair(
        other, source, (width, groups, source.positions, source.channels_adjacent, x.element_size()),
        strides=(source.channel_stride, source.position_stride),
        other_strides=(other.stride(0), other.stride(1), size0, size1, stride0, stride1, stride2),
        transposed=not source.channels_adjacent and other.stride(1) == 1 and channels > 1 and stride0 != 1,
        constants=dict(
            DIMENSIONS=len(dimensions), INT64=source.int64_offsets or reach >= 2**31, WIDTH=width
        ),
    )  # fmt: skip


def launch_sums(
    pair: Pair, mean: Tensor, rstd: Tensor, affine: tuple, silu: bool
) -> tuple[plan.Tiles, Tensor, dict[str, int]]:
    """Sums of dz and of dz xhat over chunks of the positions, [2, N, C, chunks].

    Also returns tiles for the kernel that merges them, and its constants for that.
    """
    x = pair.source.tensor
    samples, channels = x.shape[:2]
    width, groups, positions, adjacent, _ = pair.shape
    tiles = plan.chunk_tiles(*pair.shape, plan.SUM_LANES, plan.SUM_WARPS, pair.transposed)
    sum_tiles = plan.sum_tiles(
        channels, positions, adjacent, plan.SUM_LANES, plan.SUM_WARPS, pair.transposed
    )
    merge_channels = tiles.channels if tiles.groups > 1 else min(plan.power_of_two(width), 128)
    merge_chunks = min(
        plan.power_of_two(sum_tiles.position_tiles), max(plan.MERGED_VALUES // merge_channels, 1)
    )
    blocks = samples * sum_tiles.channel_tiles
    chunks, each = plan.chunks(sum_tiles.position_tiles, blocks, x.device, merge_chunks, adjacent)
    partial = mean.new_empty((2, samples, channels, chunks))
    sums_kernel[(blocks * chunks,)](
        pair.other, x, mean, rstd, partial, *affine, samples, groups, channels, positions,
        pair.source.sample_stride, *pair.strides, *pair.other_strides, chunks, each,
        CHANNELS=sum_tiles.channels, POSITIONS=sum_tiles.positions, EXACT=sum_tiles.exact,
        SILU=silu, num_warps=sum_tiles.warps, **pair.constants,
    )  # fmt: skip
    return tiles, partial, dict(MERGE_CHANNELS=merge_channels, MERGE_CHUNKS=merge_chunks)


def _input_gradient(dy, x, mean, rstd, dx, sums, weight, bias, scale, shift, silu) -> None:
    """Write dx and sums."""
    samples, channels = x.shape[:2]
    groups = mean.shape[1]
    pair = arrange_pair(dy, x, groups)
    affine = (weight, bias, scale, shift, plan.row_stride(scale), plan.row_stride(shift))
    sizes = (samples, groups, channels, pair.source.positions)
    strides = (pair.source.sample_stride, dx.stride(0), *pair.strides, *pair.other_strides)

    kernel, tiles = resident_backward_kernel, None
    if not pair.transposed:
        tiles = plan.resident_tiles(*pair.shape, plan.RESIDENT_LANES_BACKWARD)
    if tiles is None:
        kernel, tiles = looped_backward_kernel, pair.looped_tiles()
    if tiles is not None:
        kernel[(samples * plan.divide_up(groups, tiles.groups),)](
            pair.other, pair.source.tensor, mean, rstd, dx, sums, *affine, *sizes, *strides,
            GROUPS=tiles.groups, CHANNELS=tiles.channels, POSITIONS=tiles.positions,
            CHANNEL_TILES=tiles.channel_tiles, POSITION_TILES=tiles.position_tiles, EXACT=tiles.exact,
            SILU=silu, num_warps=tiles.warps, **pair.constants,
        )  # fmt: skip
        return

    tiles, partial, merging = launch_sums(pair, mean, rstd, affine, silu)
    blocks = samples * plan.divide_up(groups, tiles.groups)
    chunks, each = plan.chunks(tiles.count, blocks, x.device, tiles.count, pair.source.channels_adjacent)
    input_gradient_kernel[(blocks * chunks,)](
        pair.other, pair.source.tensor, mean, rstd, dx, partial, sums, *affine, *sizes, *strides,
        partial.shape[3], chunks, each,
        GROUPS=tiles.groups, CHANNELS=tiles.channels, POSITIONS=tiles.positions,
        CHANNEL_TILES=tiles.channel_tiles, EXACT=tiles.exact, SILU=silu,
        num_warps=tiles.warps, **merging, **pair.constants,
    )  # fmt: skip


implement(group_norm_silu_backward, _backward)
