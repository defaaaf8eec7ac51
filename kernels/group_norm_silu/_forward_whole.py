"""y of group_norm_silu where one program takes a whole slab, from registers or from L1 and L2.

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
    tile_offset,
    tile_sum_over_group,
)

# ---------------------------------------------------------------------------------------------- the slab fits


@triton.jit(do_not_specialize=plan.VARYING)
def _resident_kernel(
    x, y, mean_out, rstd_out,  # [N, C, P] twice, [N, G] twice
    weight, bias, scale, shift,  # [C], [C], [N, C], [N, C] or None
    eps, scale_stride, shift_stride,
    groups, channels, positions,  # G, C, P
    sample_stride, y_sample_stride, channel_stride, position_stride,
    INT64: tl.constexpr,
    WIDTH: tl.constexpr,  # D = C / G
    GROUPS: tl.constexpr,  # per program
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,  # per tile
    CHANNEL_TILES: tl.constexpr, POSITION_TILES: tl.constexpr, EXACT: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """A program reads the slabs of its groups, keeps them in registers, and writes them normalised."""
    sample, first_group, first_channel = locate_groups(tl.program_id(0), groups, WIDTH, GROUPS)
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    y += sample * y_sample_stride + first_channel.to(tl.int64) * channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    count = (WIDTH * 1.0) * positions

    tiles, gains, offsets = (), (), ()
    total = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for tile in tl.static_range(CHANNEL_TILES * POSITION_TILES):
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        at = tile_offset(channel, position, channel_stride, position_stride, INT64)
        value = tl.load(x + at, mask=inside, other=0.0)
        total += value.to(tl.float32)
        tiles += (value,)
        if tile % POSITION_TILES == 0:  # these loads overlap with those of x
            gain, offset = gain_and_offset(
                weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel,
                inside_block(channel, GROUPS * WIDTH, first_channel, channels, EXACT),
            )  # fmt: skip
            gains += (gain,)
            offsets += (offset,)
    # The mean of large numbers is rounded. The second pass, which sums the squares about it, corrects it.
    pivot = tile_sum_over_group(total, row, WIDTH, GROUPS) / count

    total = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    squares = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for tile in tl.static_range(CHANNEL_TILES * POSITION_TILES):
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        centred = tl.where(inside, tiles[tile].to(tl.float32) - pivot[:, None], 0.0)
        total += centred
        squares += centred * centred
    mean, variance = mean_and_variance(total, squares, count, row, WIDTH, GROUPS)
    rstd = tl.rsqrt(variance + eps)

    # The row of a group's first channel stores its statistics.
    group = sample * groups + first_group + row // WIDTH
    leads = leads_group(row, first_channel, channels, WIDTH, GROUPS)
    tl.store(mean_out + group, pivot + mean, mask=leads)
    tl.store(rstd_out + group, rstd, mask=leads)

    for tile in tl.static_range(CHANNEL_TILES * POSITION_TILES):
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        at = tile_offset(channel, position, channel_stride, position_stride, INT64)
        gain, offset = gains[tile // POSITION_TILES], offsets[tile // POSITION_TILES]
        store_normalised(y, at, tiles[tile], pivot, mean, rstd, gain, offset, inside, SILU)


# -------------------------------------------------------------------------------- the slab fits into L1 or L2


@triton.jit(do_not_specialize=plan.VARYING)
def _looped_kernel(
    x, y, mean_out, rstd_out,
    weight, bias, scale, shift, eps, scale_stride, shift_stride,
    groups, channels, positions, sample_stride, y_sample_stride, channel_stride, position_stride,
    INT64: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr, POSITION_TILES: tl.constexpr, EXACT: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """A program reads the slabs of its groups twice, the second time from L1 or L2."""
    sample, first_group, first_channel = locate_groups(tl.program_id(0), groups, WIDTH, GROUPS)
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    y += sample * y_sample_stride + first_channel.to(tl.int64) * channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    pivot = load_pivot(
        x, row, first_channel, channels, positions, channel_stride, position_stride, WIDTH, GROUPS
    )

    total = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    squares = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for tile in range(CHANNEL_TILES * POSITION_TILES):
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        at = tile_offset(channel, position, channel_stride, position_stride, INT64)
        value = tl.load(x + at, mask=inside, other=0.0)
        centred = tl.where(inside, value.to(tl.float32) - pivot[:, None], 0.0)
        total += centred
        squares += centred * centred

    # In reverse order, because what was read last is still in L1 or L2. Gain and offset are loaded one tile
    # ahead.
    last = CHANNEL_TILES * CHANNELS - CHANNELS + row
    gain, offset = gain_and_offset(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + last,
        inside_block(last, GROUPS * WIDTH, first_channel, channels, EXACT),
    )  # fmt: skip
    mean, variance = mean_and_variance(total, squares, (WIDTH * 1.0) * positions, row, WIDTH, GROUPS)
    rstd = tl.rsqrt(variance + eps)
    group = sample * groups + first_group + row // WIDTH
    leads = leads_group(row, first_channel, channels, WIDTH, GROUPS)
    tl.store(mean_out + group, pivot + mean, mask=leads)
    tl.store(rstd_out + group, rstd, mask=leads)

    for done in range(CHANNEL_TILES * POSITION_TILES):
        tile = CHANNEL_TILES * POSITION_TILES - 1 - done
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        at = tile_offset(channel, position, channel_stride, position_stride, INT64)
        value = tl.load(x + at, mask=inside, other=0.0, eviction_policy="evict_first")
        store_normalised(y, at, value, pivot, mean, rstd, gain, offset, inside, SILU)
        if CHANNEL_TILES > 1:
            following = tl.maximum(tile - 1, 0) // POSITION_TILES * CHANNELS + row
            gain, offset = gain_and_offset(
                weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + following,
                inside_block(following, GROUPS * WIDTH, first_channel, channels, EXACT),
            )  # fmt: skip
