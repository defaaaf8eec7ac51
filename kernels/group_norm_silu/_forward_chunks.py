"""y of group_norm_silu where many programs share a slab: first its moments, then y.

The formula is in forward.py, which launches these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _plan as plan
from ._tile import (
    gain_and_offset,
    inside_block,
    inside_tile,
    leads_group,
    load_pivot,
    locate_groups,
    mean_and_variance,
    store_normalised,
    take_from_group,
    tile_offset,
)


@triton.jit(do_not_specialize=plan.VARYING)
def _moments_kernel(
    x, partial,  # [N, C, P], [4, N, G, chunks]: count, mean - pivot, squared deviations, pivot
    groups, channels, positions, sample_stride, channel_stride, position_stride,
    slabs, chunks, tiles_each,  # N G, chunks of a slab, tiles of a chunk
    INT64: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNEL_TILES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A program computes the moments of one chunk of its groups' slabs."""
    chunk = tl.program_id(0) % chunks
    sample, first_group, first_channel = locate_groups(tl.program_id(0) // chunks, groups, WIDTH, GROUPS)
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    pivot = load_pivot(
        x, row, first_channel, channels, positions, channel_stride, position_stride, WIDTH, GROUPS
    )

    position_tiles = tl.cdiv(positions, POSITIONS)
    last_tile = tl.minimum((chunk + 1) * tiles_each, CHANNEL_TILES * position_tiles)
    # Accumulate per lane; reduce across threads once, after the loop, because each reduction costs barriers.
    count = 0.0
    total = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    squares = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for tile in tl.range(chunk * tiles_each, last_tile, loop_unroll_factor=2):
        channel = tile // position_tiles * CHANNELS + row
        first_position = tile % position_tiles * POSITIONS
        position = first_position + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        at = tile_offset(channel, position, channel_stride, position_stride, INT64)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, value - pivot[:, None], 0.0)
        total += centred
        squares += centred * centred
        rows = tl.minimum(WIDTH - tile // position_tiles * CHANNELS, CHANNELS)  # of one group
        count += 1.0 * rows * tl.minimum(positions - first_position, POSITIONS)

    mean, variance = mean_and_variance(total, squares, count, row, WIDTH, GROUPS)
    slot = (sample * groups + first_group + row // WIDTH) * chunks + chunk
    leads = leads_group(row, first_channel, channels, WIDTH, GROUPS)
    stride = slabs.to(tl.int64) * chunks
    tl.store(partial + slot, tl.zeros([CHANNELS], tl.float32) + count, mask=leads)
    tl.store(partial + stride + slot, mean, mask=leads)
    tl.store(partial + 2 * stride + slot, variance * count, mask=leads)
    tl.store(partial + 3 * stride + slot, pivot, mask=leads)


@triton.jit(do_not_specialize=plan.VARYING)
def _apply_kernel(
    x, y, mean_out, rstd_out, partial,
    weight, bias, scale, shift, eps, scale_stride, shift_stride,
    groups, channels, positions, sample_stride, y_sample_stride, channel_stride, position_stride,
    slabs, chunks, tiles_each,
    INT64: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNEL_TILES: tl.constexpr, EXACT: tl.constexpr,
    SILU: tl.constexpr, MAX_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program merges the moments of its groups and normalises one chunk of their slabs."""
    # In reverse order, because what the first kernel read last is still in L2.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = program % chunks
    sample, first_group, first_channel = locate_groups(program // chunks, groups, WIDTH, GROUPS)
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    y += sample * y_sample_stride + first_channel.to(tl.int64) * channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    position_tiles = tl.cdiv(positions, POSITIONS)
    gain, offset = gain_and_offset(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + row,
        inside_block(row, GROUPS * WIDTH, first_channel, channels, EXACT),
    )  # fmt: skip

    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    member = tl.arange(0, PADDED)
    part = tl.arange(0, MAX_CHUNKS)
    group_exists = (member < GROUPS) & (first_group + member < groups)
    slot = (sample * groups + first_group + member) * chunks
    exists = group_exists[:, None] & (part < chunks)[None, :]
    stride = slabs.to(tl.int64) * chunks
    counts = tl.load(partial + slot[:, None] + part[None, :], mask=exists, other=0.0)
    means = tl.load(partial + stride + slot[:, None] + part[None, :], mask=exists, other=0.0)
    squares = tl.load(partial + 2 * stride + slot[:, None] + part[None, :], mask=exists, other=0.0)
    group_pivot = tl.load(partial + 3 * stride + slot, mask=group_exists, other=0.0)  # one for all chunks
    # The moments of a union of sets (Chan, Golub, LeVeque 1979).
    count = (WIDTH * 1.0) * positions
    group_mean = tl.sum(counts * means, axis=1) / count
    difference = means - group_mean[:, None]
    group_rstd = tl.rsqrt(tl.sum(squares + counts * difference * difference, axis=1) / count + eps)
    pivot, mean, rstd = take_from_group(group_pivot, group_mean, group_rstd, row, WIDTH, GROUPS)
    if chunk == 0:
        group = sample * groups + first_group + row // WIDTH
        leads = leads_group(row, first_channel, channels, WIDTH, GROUPS)
        tl.store(mean_out + group, pivot + mean, mask=leads)
        tl.store(rstd_out + group, rstd, mask=leads)

    last_tile = tl.minimum((chunk + 1) * tiles_each, CHANNEL_TILES * position_tiles)
    for tile in range(chunk * tiles_each, last_tile):
        channel = tile // position_tiles * CHANNELS + row
        position = tile % position_tiles * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        at = tile_offset(channel, position, channel_stride, position_stride, INT64)
        value = tl.load(x + at, mask=inside, other=0.0)
        if CHANNEL_TILES > 1:
            gain, offset = gain_and_offset(
                weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel,
                inside_block(channel, GROUPS * WIDTH, first_channel, channels, EXACT),
            )  # fmt: skip
        store_normalised(y, at, value, pivot, mean, rstd, gain, offset, inside, SILU)
