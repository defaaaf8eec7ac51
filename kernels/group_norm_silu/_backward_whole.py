"""The gradient of group_norm_silu where one program takes a whole slab, from registers or from L1 and L2.

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

# ---------------------------------------------------------------------------------------------- the slab fits


@triton.jit(do_not_specialize=plan.VARYING)
def resident_backward_kernel(
    dy, x, mean_in, rstd_in, dx, sums,  # [N, C, P] twice, [N, G] twice, [N, C, P], [2, N, C]
    weight, bias, scale, shift, scale_stride, shift_stride,
    samples, groups, channels, positions,
    sample_stride, dx_sample_stride, channel_stride, position_stride,
    dy_sample_stride, dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
    DIMENSIONS: tl.constexpr, INT64: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr, POSITION_TILES: tl.constexpr, EXACT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """A program reads x and dy of its groups once and keeps x - mean and dz in registers."""
    sample, first_group, first_channel = locate_groups(tl.program_id(0), groups, WIDTH, GROUPS)
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    dx += sample * dx_sample_stride + first_channel.to(tl.int64) * channel_stride
    dy += sample * dy_sample_stride + first_channel.to(tl.int64) * dy_channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    mean, rstd = load_statistics(mean_in, rstd_in, sample, groups, first_group, row, WIDTH, GROUPS)
    channel_sum = sums + sample * channels + first_channel
    sum_stride = samples.to(tl.int64) * channels

    kept_centred, kept_dz, gains = (), (), ()
    mean1 = tl.zeros([CHANNELS], tl.float32)
    mean2 = tl.zeros([CHANNELS], tl.float32)
    for channel_tile in tl.static_range(CHANNEL_TILES):
        channel = channel_tile * CHANNELS + row
        exists = inside_block(channel, GROUPS * WIDTH, first_channel, channels, EXACT)
        gain, offset = gain_and_offset(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel, exists
        )
        total1 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        total2 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        for position_tile in tl.static_range(POSITION_TILES):
            position = position_tile * POSITIONS + column
            inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
            centred, dz = load_centred_and_dz(
                x, dy, channel, position, inside, mean, rstd * gain, offset, channel_stride, position_stride,
                dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
                DIMENSIONS, INT64, SILU,
            )  # fmt: skip
            total1 += dz
            total2 += dz * centred
            kept_centred += (centred,)
            kept_dz += (dz,)
        sum1 = tl.sum(total1, axis=1)
        sum2 = tl.sum(total2, axis=1) * rstd
        tl.store(channel_sum + channel, sum1, mask=exists)
        tl.store(channel_sum + sum_stride + channel, sum2, mask=exists)
        mean1 += gain * sum1
        mean2 += gain * sum2
        gains += (gain,)
    count = (WIDTH * 1.0) * positions
    mean1 = sum_over_group(mean1, row, WIDTH, GROUPS) / count
    mean2 = sum_over_group(mean2, row, WIDTH, GROUPS) / count

    for tile in tl.static_range(CHANNEL_TILES * POSITION_TILES):
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        at = tile_offset(channel, position, channel_stride, position_stride, INT64)
        gain = gains[tile // POSITION_TILES]
        store_input_gradient(dx, at, kept_dz[tile], kept_centred[tile], rstd, gain, mean1, mean2, inside)


# -------------------------------------------------------------------------------- the slab fits into L1 or L2


@triton.jit(do_not_specialize=plan.VARYING)
def looped_backward_kernel(
    dy, x, mean_in, rstd_in, dx, sums,
    weight, bias, scale, shift, scale_stride, shift_stride,
    samples, groups, channels, positions,
    sample_stride, dx_sample_stride, channel_stride, position_stride,
    dy_sample_stride, dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
    DIMENSIONS: tl.constexpr, INT64: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr, POSITION_TILES: tl.constexpr, EXACT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """A program reads x and dy of its groups twice, the second time from L1 or L2."""
    sample, first_group, first_channel = locate_groups(tl.program_id(0), groups, WIDTH, GROUPS)
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    dx += sample * dx_sample_stride + first_channel.to(tl.int64) * channel_stride
    dy += sample * dy_sample_stride + first_channel.to(tl.int64) * dy_channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    mean, rstd = load_statistics(mean_in, rstd_in, sample, groups, first_group, row, WIDTH, GROUPS)
    channel_sum = sums + sample * channels + first_channel
    sum_stride = samples.to(tl.int64) * channels

    mean1 = tl.zeros([CHANNELS], tl.float32)
    mean2 = tl.zeros([CHANNELS], tl.float32)
    for channel_tile in range(CHANNEL_TILES):
        channel = channel_tile * CHANNELS + row
        exists = inside_block(channel, GROUPS * WIDTH, first_channel, channels, EXACT)
        gain, offset = gain_and_offset(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel, exists
        )
        total1 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        total2 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        for position_tile in range(POSITION_TILES):
            position = position_tile * POSITIONS + column
            inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
            centred, dz = load_centred_and_dz(
                x, dy, channel, position, inside, mean, rstd * gain, offset, channel_stride, position_stride,
                dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
                DIMENSIONS, INT64, SILU,
            )  # fmt: skip
            total1 += dz
            total2 += dz * centred
        sum1 = tl.sum(total1, axis=1)
        sum2 = tl.sum(total2, axis=1) * rstd
        tl.store(channel_sum + channel, sum1, mask=exists)
        tl.store(channel_sum + sum_stride + channel, sum2, mask=exists)
        mean1 += gain * sum1
        mean2 += gain * sum2
    count = (WIDTH * 1.0) * positions
    mean1 = sum_over_group(mean1, row, WIDTH, GROUPS) / count
    mean2 = sum_over_group(mean2, row, WIDTH, GROUPS) / count

    # In reverse order, because what was read last is still in L1 or L2.
    for done in range(CHANNEL_TILES * POSITION_TILES):
        tile = CHANNEL_TILES * POSITION_TILES - 1 - done
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
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
