"""One tile [channels, positions] of a group norm: addresses, loads, stores, and sums over its groups."""

from __future__ import annotations

import triton
import triton.language as tl

from .._math import silu, silu_derivative


@triton.jit
def locate_groups(program, groups, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """program -> (sample, first of the program's GROUPS groups, first channel of that group)."""
    blocks = tl.cdiv(groups, GROUPS)
    first_group = (program % blocks) * GROUPS
    return (program // blocks).to(tl.int64), first_group, first_group * WIDTH


@triton.jit
def leads_group(row, first_channel, channels, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Which rows are the first channel of a group. They store the group's statistics."""
    return (row % WIDTH == 0) & (row < GROUPS * WIDTH) & (first_channel + row < channels)


@triton.jit
def load_pivot(
    x, row, first_channel, channels, positions, channel_stride, position_stride,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """For each row a float32 number near the mean of its group.

    It is the mean of values of the group's first channel that are spread over the positions: of 32 values for
    one group, of 4 for several. A single value would not do: a corner of an image may differ from all others.
    """
    if GROUPS == 1:
        position = tl.minimum(tl.arange(0, 32) * tl.cdiv(positions, 32), positions - 1).to(tl.int64)
        mean = tl.sum(tl.load(x + position * position_stride).to(tl.float32), axis=0) / 32
        return tl.zeros(row.shape, tl.float32) + mean
    origin = tl.minimum(row // WIDTH, GROUPS - 1) * WIDTH
    exists = first_channel + origin < channels
    total = tl.zeros(row.shape, tl.float32)
    for sample in tl.static_range(4):  # each thread loads for its rows: no barrier delays the loads of x
        position = tl.minimum(sample * tl.cdiv(positions, 4), positions - 1)
        at = origin.to(tl.int64) * channel_stride + position.to(tl.int64) * position_stride
        total += tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    return total / 4


@triton.jit
def load_statistics(
    mean, rstd, sample, groups, first_group, row, WIDTH: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """For each row the mean and rstd of its group, from mean and rstd [N, G]."""
    group = first_group + tl.minimum(row // WIDTH, GROUPS - 1)
    exists = group < groups
    at = sample * groups + group
    return tl.load(mean + at, mask=exists, other=0.0), tl.load(rstd + at, mask=exists, other=0.0)


@triton.jit
def sum_over_group(value, row, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """For each channel the sum of `value` over its group: [channels] -> [channels], float32.

    Channel `row` of the block is in group row // WIDTH. With GROUPS = 1 all rows are one group, for every
    WIDTH. Rows past the last group must hold 0.
    """
    if GROUPS == 1:
        return tl.zeros_like(value) + tl.sum(value, axis=0)
    # The channels of a group need not be a power of two, so a reshape cannot separate groups. A mask can.
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    member = (row // WIDTH)[:, None] == tl.arange(0, PADDED)[None, :]
    total = tl.sum(tl.where(member, value[:, None], 0.0), axis=0)
    return tl.sum(tl.where(member, total[None, :], 0.0), axis=1)


@triton.jit
def flat(tile):
    """All elements of a tile, in any order."""
    return tl.reshape(tile, [tile.shape[0] * tile.shape[1]], can_reorder=True)


@triton.jit
def tile_sum_over_group(tile, row, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """`sum_over_group` of the sums of a tile [channels, positions] over its positions."""
    if GROUPS == 1:  # one reduction, which has half the barriers of two
        return tl.zeros(row.shape, tl.float32) + tl.sum(flat(tile), axis=0)
    return sum_over_group(tl.sum(tile, axis=1), row, WIDTH, GROUPS)


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def take_from_group(first, second, third, row, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """For each channel three numbers of its group: [groups, padded to a power of two] -> [channels].

    Numbers past the last group must be finite.
    """
    member = (row // WIDTH)[:, None] == tl.arange(0, first.shape[0])[None, :]
    if GROUPS == 1:
        member = tl.full([row.shape[0], 1], 1, tl.int1)  # including the rows past the group
    first = tl.where(member, first[None, :], 0.0)
    second = tl.where(member, second[None, :], 0.0)
    third = tl.where(member, third[None, :], 0.0)
    return tl.reduce((first, second, third), 1, add_triples)


@triton.jit
def mean_and_variance(total, squares, count, row, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """For each row the mean minus the pivot, and the variance, of its group.

    total, squares: sums of (x - pivot) and of its square, per lane. The relative error of the variance grows
    with (pivot - mean)^2 / variance, so the pivot must be near the mean (load_pivot).
    """
    if GROUPS == 1:  # as in tile_sum_over_group
        total, squares = tl.reduce((flat(total), flat(squares)), 0, add_pairs)
        total += tl.zeros(row.shape, tl.float32)
        squares += tl.zeros(row.shape, tl.float32)
    else:
        total, squares = tl.reduce((total, squares), 1, add_pairs)
        total = sum_over_group(total, row, WIDTH, GROUPS)
        squares = sum_over_group(squares, row, WIDTH, GROUPS)
    mean = total / count
    return mean, tl.maximum(squares / count - mean * mean, 0.0)


@triton.jit
def tile_offset(channel, position, channel_stride, position_stride, INT64: tl.constexpr):
    """Offsets of a tile's elements within their sample, [channels, positions].

    INT64: a sample has 2**31 elements or more. Smaller ones use int32: 64-bit offsets take twice the
    registers, and a tile in channels_last needs one offset for each position of a thread.
    """
    if INT64:
        channel = channel.to(tl.int64)
        position = position.to(tl.int64)
    return channel[:, None] * channel_stride + position[None, :] * position_stride


@triton.jit
def inside_block(channel, block_channels, first_channel, channels, EXACT: tl.constexpr):
    """Which channels of a tile exist. `channel` counts from the first channel of the block."""
    if EXACT:  # the compiler removes a constant mask
        return tl.full(channel.shape, 1, tl.int1)
    return (channel < block_channels) & (first_channel + channel < channels)


@triton.jit
def inside_tile(channel, block_channels, first_channel, channels, position, positions, EXACT: tl.constexpr):
    """Which elements of a tile exist, [channels, positions]."""
    if EXACT:
        return tl.full([channel.shape[0], position.shape[0]], 1, tl.int1)
    exists = inside_block(channel, block_channels, first_channel, channels, EXACT)
    return exists[:, None] & (position < positions)[None, :]


@triton.jit
def gain_and_offset(
    weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside
):  # fmt: skip
    """weight (1 + scale) and bias (1 + scale) + shift: the affine map after the norm, in float32.

    channel: [channels]; inside: which of them exist. Absent tensors are None; strides are from one sample to
    the next.
    """
    gain = tl.full(channel.shape, 1.0, tl.float32)
    offset = tl.full(channel.shape, 0.0, tl.float32)
    if weight is not None:
        gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        factor = 1.0 + tl.load(scale + sample * scale_stride + channel, mask=inside, other=0.0).to(tl.float32)
        gain = gain * factor
        offset = offset * factor
    if shift is not None:
        offset += tl.load(shift + sample * shift_stride + channel, mask=inside, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def store_normalised(y, at, value, pivot, mean, rstd, gain, offset, inside, SILU: tl.constexpr):
    """y = act((value - pivot - mean) rstd gain + offset), where mean is that of x - pivot.

    value and inside: [channels, positions]; the other tensors: [channels].
    """
    slope = rstd * gain
    z = (value.to(tl.float32) - pivot[:, None]) * slope[:, None]
    z += (offset - mean * slope)[:, None]
    if SILU:
        z = silu(z)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def strided_offset(
    position, size0, size1, stride0, stride1, stride2, DIMENSIONS: tl.constexpr, INT64: tl.constexpr
):  # fmt: skip
    """Offset of a position in a sample whose positions have up to three strides, the innermost first."""
    inner, middle, outer = position, position, position
    if DIMENSIONS > 1:
        inner, outer = position % size0, position // size0
    if DIMENSIONS > 2:
        middle, outer = outer % size1, outer // size1
    if INT64:
        inner, middle, outer = inner.to(tl.int64), middle.to(tl.int64), outer.to(tl.int64)
    if DIMENSIONS == 1:
        return inner * stride0
    if DIMENSIONS == 2:
        return inner * stride0 + outer * stride1
    return inner * stride0 + middle * stride1 + outer * stride2


@triton.jit
def load_centred_and_dz(
    x, dy, channel, position, inside, mean, slope, offset,  # mean, rstd gain, offset: [channels]
    channel_stride, position_stride,
    dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
    DIMENSIONS: tl.constexpr, INT64: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """x - mean and dz of a tile, [channels, positions]. dz is 0 where an element does not exist."""
    at = tile_offset(channel, position, channel_stride, position_stride, INT64)
    dy_position = strided_offset(
        position, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2, DIMENSIONS, INT64
    )
    dy_at = tile_offset(channel, dy_position, dy_channel_stride, 1, INT64)
    centred = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean[:, None]
    dz = tl.load(dy + dy_at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        dz *= silu_derivative(centred * slope[:, None] + offset[:, None])
    return centred, dz


@triton.jit
def store_input_gradient(dx, at, dz, centred, rstd, gain, mean1, mean2, inside):
    """dx = rstd (gain dz - mean1 - xhat mean2), xhat = centred rstd. mean1, mean2: means over the group."""
    value = dz * (rstd * gain)[:, None] - centred * (rstd * rstd * mean2)[:, None]
    value -= (rstd * mean1)[:, None]
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)
