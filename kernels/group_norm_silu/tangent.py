"""dy = act'(z) (g P(dx) + dg xhat + do), P(u) = rstd (u - mean(u) - xhat mean(u xhat)), z = g xhat + o

The forward-mode derivative. g = weight (1 + scale), o = bias (1 + scale) + shift; dg and do are their
tangents, float32 [N, C], which op.py computes. The means are over the group. P is the derivative of the norm;
it is its own transpose, so the backward pass computes P(g dz).

Nothing but x, mean and rstd is needed, which the forward pass saves for the gradient anyway. dx is read in
place, for all strides. Bytes per element in bfloat16: 6, of which 4 are read a second time: from L1 or L2
where a program takes a whole slab (one launch), or from L2 or memory where the slab is cut into chunks (two
launches, the first is that of the backward pass). Every sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._math import silu_derivative
from .._op import implement
from .._planes import memory_format
from . import _plan as plan
from ._tile import (
    gain_and_offset,
    inside_block,
    inside_tile,
    load_centred_and_dz,
    load_statistics,
    locate_groups,
    sum_over_group,
    tile_offset,
    tile_sum_over_group,
)
from .backward import arrange_pair, launch_sums
from .op import group_norm_silu_tangent


@triton.jit
def _store_tangent(
    x, dx, dy, weight, bias, scale, shift, dgain, doffset,
    scale_stride, shift_stride, dgain_stride, doffset_stride,
    sample, first_channel, channels, positions, channel, position, mean, rstd, mean1, mean2,
    channel_stride, position_stride,
    dx_channel_stride, dx_size0, dx_size1, dx_stride0, dx_stride1, dx_stride2,
    DIMENSIONS: tl.constexpr, INT64: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, EXACT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dy of a tile. mean1, mean2: the means over the group of dx and of dx xhat."""
    exists = inside_block(channel, GROUPS * WIDTH, first_channel, channels, EXACT)
    inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
    gain, offset = gain_and_offset(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel, exists
    )
    centred, dz = load_centred_and_dz(
        x, dx, channel, position, inside, mean, rstd, offset, channel_stride, position_stride,
        dx_channel_stride, dx_size0, dx_size1, dx_stride0, dx_stride1, dx_stride2,
        DIMENSIONS, INT64, False,
    )  # fmt: skip
    slope = rstd * gain
    along_xhat = -slope * mean2
    if dgain is not None:
        at = sample * dgain_stride + first_channel + channel
        along_xhat += tl.load(dgain + at, mask=exists, other=0.0)
    dz = (dz - mean1[:, None]) * slope[:, None] + centred * (rstd * along_xhat)[:, None]
    if doffset is not None:
        at = sample * doffset_stride + first_channel + channel
        dz += tl.load(doffset + at, mask=exists, other=0.0)[:, None]
    if SILU:
        dz *= silu_derivative(centred * slope[:, None] + offset[:, None])
    at = tile_offset(channel, position, channel_stride, position_stride, INT64)
    tl.store(dy + at, dz.to(dy.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=plan.VARYING)
def _whole_tangent_kernel(
    dx, x, mean_in, rstd_in, dy,  # [N, C, P] twice, [N, G] twice, [N, C, P]
    weight, bias, scale, shift, dgain, doffset,  # [C] twice, [N, C] four times, or None
    scale_stride, shift_stride, dgain_stride, doffset_stride,
    groups, channels, positions,
    sample_stride, dy_sample_stride, channel_stride, position_stride,
    dx_sample_stride, dx_channel_stride, dx_size0, dx_size1, dx_stride0, dx_stride1, dx_stride2,
    DIMENSIONS: tl.constexpr, INT64: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr, POSITION_TILES: tl.constexpr, EXACT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """A program reads x and dx of its groups twice, the second time from L1 or L2."""
    sample, first_group, first_channel = locate_groups(tl.program_id(0), groups, WIDTH, GROUPS)
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    dy += sample * dy_sample_stride + first_channel.to(tl.int64) * channel_stride
    dx += sample * dx_sample_stride + first_channel.to(tl.int64) * dx_channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    mean, rstd = load_statistics(mean_in, rstd_in, sample, groups, first_group, row, WIDTH, GROUPS)

    total1 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    total2 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for tile in range(CHANNEL_TILES * POSITION_TILES):
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        centred, dz = load_centred_and_dz(
            x, dx, channel, position, inside, mean, rstd, mean, channel_stride, position_stride,
            dx_channel_stride, dx_size0, dx_size1, dx_stride0, dx_stride1, dx_stride2,
            DIMENSIONS, INT64, False,
        )  # fmt: skip
        total1 += dz
        total2 += dz * centred
    count = (WIDTH * 1.0) * positions
    mean1 = tile_sum_over_group(total1, row, WIDTH, GROUPS) / count
    mean2 = tile_sum_over_group(total2, row, WIDTH, GROUPS) * rstd / count

    # In reverse order, because what was read last is still in L1 or L2.
    for done in range(CHANNEL_TILES * POSITION_TILES):
        tile = CHANNEL_TILES * POSITION_TILES - 1 - done
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        _store_tangent(
            x, dx, dy, weight, bias, scale, shift, dgain, doffset,
            scale_stride, shift_stride, dgain_stride, doffset_stride,
            sample, first_channel, channels, positions, channel, position, mean, rstd, mean1, mean2,
            channel_stride, position_stride,
            dx_channel_stride, dx_size0, dx_size1, dx_stride0, dx_stride1, dx_stride2,
            DIMENSIONS, INT64, WIDTH, GROUPS, EXACT, SILU,
        )  # fmt: skip


@triton.jit(do_not_specialize=plan.VARYING)
def _chunk_tangent_kernel(
    dx, x, mean_in, rstd_in, dy, partial,  # as above, and [2, N, C, sum_chunks] of sums_kernel
    weight, bias, scale, shift, dgain, doffset,
    scale_stride, shift_stride, dgain_stride, doffset_stride,
    samples, groups, channels, positions,
    sample_stride, dy_sample_stride, channel_stride, position_stride,
    dx_sample_stride, dx_channel_stride, dx_size0, dx_size1, dx_stride0, dx_stride1, dx_stride2,
    sum_chunks, chunks, tiles_each,
    DIMENSIONS: tl.constexpr, INT64: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr, EXACT: tl.constexpr, SILU: tl.constexpr,
    MERGE_CHANNELS: tl.constexpr, MERGE_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program merges the sums of its groups and computes dy on one chunk of their slabs."""
    # In reverse order, because what the first kernel read last is still in L2.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = program % chunks
    sample, first_group, first_channel = locate_groups(program // chunks, groups, WIDTH, GROUPS)
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    dy += sample * dy_sample_stride + first_channel.to(tl.int64) * channel_stride
    dx += sample * dx_sample_stride + first_channel.to(tl.int64) * dx_channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    mean, rstd = load_statistics(mean_in, rstd_in, sample, groups, first_group, row, WIDTH, GROUPS)

    merged = tl.arange(0, MERGE_CHANNELS)
    part = tl.arange(0, MERGE_CHUNKS)
    sum_stride = samples.to(tl.int64) * channels * sum_chunks
    mean1 = tl.zeros([MERGE_CHANNELS], tl.float32)
    mean2 = tl.zeros([MERGE_CHANNELS], tl.float32)
    for first in range(0, GROUPS * WIDTH, MERGE_CHANNELS):  # one iteration, except for very large groups
        exists = (first + merged < GROUPS * WIDTH) & (first_channel + first + merged < channels)
        slot = (sample * channels + first_channel + first + merged)[:, None] * sum_chunks + part[None, :]
        inside = exists[:, None] & (part < sum_chunks)[None, :]
        mean1 += tl.sum(tl.load(partial + slot, mask=inside, other=0.0), axis=1)
        mean2 += tl.sum(tl.load(partial + sum_stride + slot, mask=inside, other=0.0), axis=1)
    count = (WIDTH * 1.0) * positions
    if GROUPS == 1:
        mean1 = tl.zeros([CHANNELS], tl.float32) + tl.sum(mean1, axis=0) / count
        mean2 = tl.zeros([CHANNELS], tl.float32) + tl.sum(mean2, axis=0) / count
    else:  # MERGE_CHANNELS is CHANNELS
        mean1 = sum_over_group(mean1, row, WIDTH, GROUPS) / count
        mean2 = sum_over_group(mean2, row, WIDTH, GROUPS) / count

    position_tiles = tl.cdiv(positions, POSITIONS)
    last_tile = tl.minimum((chunk + 1) * tiles_each, CHANNEL_TILES * position_tiles)
    for tile in range(chunk * tiles_each, last_tile):
        channel = tile // position_tiles * CHANNELS + row
        position = tile % position_tiles * POSITIONS + column
        _store_tangent(
            x, dx, dy, weight, bias, scale, shift, dgain, doffset,
            scale_stride, shift_stride, dgain_stride, doffset_stride,
            sample, first_channel, channels, positions, channel, position, mean, rstd, mean1, mean2,
            channel_stride, position_stride,
            dx_channel_stride, dx_size0, dx_size1, dx_stride0, dx_stride1, dx_stride2,
            DIMENSIONS, INT64, WIDTH, GROUPS, EXACT, SILU,
        )  # fmt: skip


def _tangent(
    dx: Tensor,  # [N, C, *]
    x: Tensor,  # [N, C, *]
    mean: Tensor,  # [N, G]
    rstd: Tensor,  # [N, G]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    scale: Tensor | None,  # [N, C]
    shift: Tensor | None,  # [N, C]
    dgain: Tensor | None,  # [N, C]
    doffset: Tensor | None,  # [N, C]
    silu: bool,
) -> Tensor:
    """The tangent of y along dx, dgain and doffset, in the memory format of x."""
    dy = torch.empty_like(x, memory_format=memory_format(x))
    if x.numel() == 0:
        return dy
    samples, channels = x.shape[:2]
    groups = mean.shape[1]
    pair = arrange_pair(dx, x, groups)
    given = [plan.rows(value) for value in (weight, bias, scale, shift, dgain, doffset)]
    affine = (*given, *(plan.row_stride(value) for value in given[2:]))
    sizes = (groups, channels, pair.source.positions)
    strides = (pair.source.sample_stride, dy.stride(0), *pair.strides)
    with torch.cuda.device_of(x):
        tiles = pair.looped_tiles()
        if tiles is not None:
            _whole_tangent_kernel[(samples * plan.divide_up(groups, tiles.groups),)](
                pair.other, pair.source.tensor, mean, rstd, dy, *affine, *sizes, *strides,
                *pair.other_strides,
                GROUPS=tiles.groups, CHANNELS=tiles.channels, POSITIONS=tiles.positions,
                CHANNEL_TILES=tiles.channel_tiles, POSITION_TILES=tiles.position_tiles, EXACT=tiles.exact,
                SILU=silu, num_warps=tiles.warps, **pair.constants,
            )  # fmt: skip
            return dy
        plain = (None, None, None, None, 0, 0)  # dx is not a gradient of y: neither map nor activation
        tiles, partial, merging = launch_sums(pair, mean, rstd, plain, silu=False)
        blocks = samples * plan.divide_up(groups, tiles.groups)
        chunks, each = plan.chunks(
            tiles.count, blocks, x.device, tiles.count, pair.source.channels_adjacent
        )
        _chunk_tangent_kernel[(blocks * chunks,)](
            pair.other, pair.source.tensor, mean, rstd, dy, partial, *affine, samples, *sizes, *strides,
            *pair.other_strides, partial.shape[3], chunks, each,
            GROUPS=tiles.groups, CHANNELS=tiles.channels, POSITIONS=tiles.positions,
            CHANNEL_TILES=tiles.channel_tiles, EXACT=tiles.exact, SILU=silu, num_warps=tiles.warps,
            **merging, **pair.constants,
        )  # fmt: skip
    return dy


implement(group_norm_silu_tangent, _tangent)
