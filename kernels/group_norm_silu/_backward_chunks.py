"""The gradient of group_norm_silu where several programs share a slab: first its sums, then dx.

The formulas are in backward.py, which launches these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _plan as plan
from ._tile import (
    gain_and_offset,
    inside_block,
    inside_tile,
    load_centred_and_dz,
    load_statistics,
    locate_groups,
    store_input_gradient,
    sum_over_group,
    tile_offset,
)


@triton.jit(do_not_specialize=plan.VARYING)
def sums_kernel(
    dy, x, mean_in, rstd_in, partial,  # [N, C, P] twice, [N, G] twice, [2, N, C, chunks]
    weight, bias, scale, shift, scale_stride, shift_stride,
    samples, groups, channels, positions, sample_stride, channel_stride, position_stride,
    dy_sample_stride, dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
    chunks, tiles_each,  # chunks of a channel's positions, tiles of a chunk
    DIMENSIONS: tl.constexpr, INT64: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, EXACT: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """A program sums dz and dz xhat over one chunk of the positions of some channels, across groups."""
    blocks = tl.cdiv(channels, CHANNELS)
    chunk = tl.program_id(0) % chunks
    block = tl.program_id(0) // chunks
    sample = (block // blocks).to(tl.int64)
    x += sample * sample_stride
    dy += sample * dy_sample_stride
    channel = (block % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    group = sample * groups + channel // WIDTH
    mean = tl.load(mean_in + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_in + group, mask=exists, other=0.0)
    gain, offset = gain_and_offset(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists
    )

    total1 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    total2 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    last_tile = tl.minimum((chunk + 1) * tiles_each, tl.cdiv(positions, POSITIONS))
    for tile in range(chunk * tiles_each, last_tile):
        position = tile * POSITIONS + tl.arange(0, POSITIONS)
        inside = inside_tile(channel, channels, 0, channels, position, positions, EXACT)
        centred, dz = load_centred_and_dz(
            x, dy, channel, position, inside, mean, rstd * gain, offset, channel_stride, position_stride,
            dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
            DIMENSIONS, INT64, SILU,
        )  # fmt: skip
        total1 += dz
        total2 += dz * centred
    slot = (sample * channels + channel) * chunks + chunk
    tl.store(partial + slot, tl.sum(total1, axis=1), mask=exists)
    tl.store(
        partial + samples.to(tl.int64) * channels * chunks + slot, tl.sum(total2, axis=1) * rstd, mask=exists
    )


@triton.jit(do_not_specialize=plan.VARYING)
def input_gradient_kernel(
    dy, x, mean_in, rstd_in, dx, partial, sums,  # as above, and [2, N, C]
    weight, bias, scale, shift, scale_stride, shift_stride,
    samples, groups, channels, positions,
    sample_stride, dx_sample_stride, channel_stride, position_stride,
    dy_sample_stride, dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
    sum_chunks, chunks, tiles_each,
    DIMENSIONS: tl.constexpr, INT64: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr, EXACT: tl.constexpr, SILU: tl.constexpr,
    MERGE_CHANNELS: tl.constexpr, MERGE_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program merges the sums of its groups and computes dx on one chunk of their slabs."""
    # In reverse order, because what the first kernel read last is still in L2.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = program % chunks
    sample, first_group, first_channel = locate_groups(program // chunks, groups, WIDTH, GROUPS)
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    dx += sample * dx_sample_stride + first_channel.to(tl.int64) * channel_stride
    dy += sample * dy_sample_stride + first_channel.to(tl.int64) * dy_channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    mean, rstd = load_statistics(mean_in, rstd_in, sample, groups, first_group, row, WIDTH, GROUPS)

    merged = tl.arange(0, MERGE_CHANNELS)
    part = tl.arange(0, MERGE_CHUNKS)
    sum_stride = samples.to(tl.int64) * channels
    mean1 = tl.zeros([MERGE_CHANNELS], tl.float32)
    mean2 = tl.zeros([MERGE_CHANNELS], tl.float32)
    for first in range(0, GROUPS * WIDTH, MERGE_CHANNELS):  # one iteration, except for very large groups
        exists = (first + merged < GROUPS * WIDTH) & (first_channel + first + merged < channels)
        channel = first_channel + first + merged
        slot = (sample * channels + channel)[:, None] * sum_chunks + part[None, :]
        inside = exists[:, None] & (part < sum_chunks)[None, :]
        sum1 = tl.sum(tl.load(partial + slot, mask=inside, other=0.0), axis=1)
        sum2 = tl.sum(tl.load(partial + sum_stride * sum_chunks + slot, mask=inside, other=0.0), axis=1)
        gain, offset = gain_and_offset(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists
        )
        mean1 += gain * sum1
        mean2 += gain * sum2
        if chunk == 0:
            tl.store(sums + sample * channels + channel, sum1, mask=exists)
            tl.store(sums + sum_stride + sample * channels + channel, sum2, mask=exists)
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
        exists = inside_block(channel, GROUPS * WIDTH, first_channel, channels, EXACT)
        gain, offset = gain_and_offset(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel, exists
        )
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        centred, dz = load_centred_and_dz(
            x, dy, channel, position, inside, mean, rstd * gain, offset, channel_stride, position_stride,
            dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
            DIMENSIONS, INT64, SILU,
        )  # fmt: skip
        at = tile_offset(channel, position, channel_stride, position_stride, INT64)
        store_input_gradient(dx, at, dz, centred, rstd, gain, mean1, mean2, inside)
