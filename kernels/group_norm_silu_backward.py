"""dx = rstd (g dz - m1 - xhat m2), dz = dy act'(g xhat + o), m1, m2 = means over the group of g dz, g dz xhat

g = weight (1 + scale), o = bias (1 + scale) + shift, xhat = (x - mean) rstd. All other gradients follow from
two sums per sample and channel over the positions, S1 = sum dz and S2 = sum dz xhat:

    dshift = S1, dscale = weight S2 + bias S1, dweight = sum_n (1 + scale) S2, dbias = sum_n (1 + scale) S1

Only x, mean and rstd are kept from the forward pass; the activation is computed again. Every sum has one
writer and one order: no atomics, the same bits every time. dy is read where it lies, whatever its strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm_plan as plan
from ._op import define
from ._tile import gain_and_offset, inside_tile, over_group, silu_derivative, tile_offset

# ----------------------------------------------------------------------------------------------- shared maths


@triton.jit
def _grad_offset(position, size0, size1, stride0, stride1, stride2, DIMENSIONS: tl.constexpr):
    """Where a position lies in dy, whose positions may take up to three strides (innermost first)."""
    if DIMENSIONS == 1:
        return position.to(tl.int64) * stride0
    inner, outer = position % size0, position // size0
    if DIMENSIONS == 2:
        return inner.to(tl.int64) * stride0 + outer.to(tl.int64) * stride1
    middle, outer = outer % size1, outer // size1
    return inner.to(tl.int64) * stride0 + middle.to(tl.int64) * stride1 + outer.to(tl.int64) * stride2


@triton.jit
def _load_normalised_and_dz(
    x, dy, channel, position, inside, mean, rstd, gain, offset,  # mean to offset: [channels]
    channel_stride, position_stride,
    dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
    DIMENSIONS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """xhat and dz of a tile, [channels, positions]; both are 0 outside."""
    at = tile_offset(channel, position, channel_stride, position_stride)
    dy_at = (
        channel.to(tl.int64)[:, None] * dy_channel_stride
        + _grad_offset(position, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2, DIMENSIONS)[None, :]
    )
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    dz = tl.load(dy + dy_at, mask=inside, other=0.0).to(tl.float32)
    normalised = tl.where(inside, (value - mean[:, None]) * rstd[:, None], 0.0)
    if SILU:
        dz *= silu_derivative(normalised * gain[:, None] + offset[:, None])
    return normalised, dz


# ---------------------------------------------------------------------------------------------- the slab fits


@triton.jit(do_not_specialize=plan.VARYING)
def _resident_backward_kernel(
    dy, x, mean_in, rstd_in, dx, sums,  # [N, C, P] twice, [N, G] twice, [N, C, P], [2, N, C]
    weight, bias, scale, shift, scale_stride, shift_stride,
    samples, groups, channels, positions,
    sample_stride, dx_sample_stride, channel_stride, position_stride,
    dy_sample_stride, dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
    DIMENSIONS: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr, POSITION_TILES: tl.constexpr, EXACT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """A program reads x and dy of its groups once and keeps xhat and dz in registers."""
    blocks = tl.cdiv(groups, GROUPS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first_group = (tl.program_id(0) % blocks) * GROUPS
    first_channel = first_group * WIDTH
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    dx += sample * dx_sample_stride + first_channel.to(tl.int64) * channel_stride
    dy += sample * dy_sample_stride + first_channel.to(tl.int64) * dy_channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    group = first_group + tl.minimum(row // WIDTH, GROUPS - 1)
    mean = tl.load(mean_in + sample * groups + group, mask=group < groups, other=0.0)
    rstd = tl.load(rstd_in + sample * groups + group, mask=group < groups, other=0.0)
    channel_sum = sums + sample * channels + first_channel
    sum_stride = samples.to(tl.int64) * channels

    normalised = ()
    weighted = ()  # gain dz
    mean1 = tl.zeros([CHANNELS], tl.float32)
    mean2 = tl.zeros([CHANNELS], tl.float32)
    for channel_tile in tl.static_range(CHANNEL_TILES):
        channel = channel_tile * CHANNELS + row
        exists = (channel < GROUPS * WIDTH) & (first_channel + channel < channels)
        gain, offset = gain_and_offset(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel, exists
        )
        total1 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        total2 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        for position_tile in tl.static_range(POSITION_TILES):
            position = position_tile * POSITIONS + column
            inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
            value, dz = _load_normalised_and_dz(
                x, dy, channel, position, inside, mean, rstd, gain, offset, channel_stride, position_stride,
                dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2, DIMENSIONS, SILU,
            )  # fmt: skip
            total1 += dz
            total2 += dz * value
            normalised += (value,)
            weighted += (dz * gain[:, None],)
        sum1 = tl.sum(total1, axis=1)
        sum2 = tl.sum(total2, axis=1)
        tl.store(channel_sum + channel, sum1, mask=exists)
        tl.store(channel_sum + sum_stride + channel, sum2, mask=exists)
        mean1 += gain * sum1
        mean2 += gain * sum2
    count = (WIDTH * 1.0) * positions
    mean1 = over_group(mean1, row, WIDTH, GROUPS) / count
    mean2 = over_group(mean2, row, WIDTH, GROUPS) / count

    for tile in tl.static_range(CHANNEL_TILES * POSITION_TILES):
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        value = rstd[:, None] * (weighted[tile] - mean1[:, None] - normalised[tile] * mean2[:, None])
        at = tile_offset(channel, position, channel_stride, position_stride)
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------- the slab fits into the nearer caches


@triton.jit(do_not_specialize=plan.VARYING)
def _looped_backward_kernel(
    dy, x, mean_in, rstd_in, dx, sums,
    weight, bias, scale, shift, scale_stride, shift_stride,
    samples, groups, channels, positions,
    sample_stride, dx_sample_stride, channel_stride, position_stride,
    dy_sample_stride, dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
    DIMENSIONS: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr, POSITION_TILES: tl.constexpr, EXACT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """A program reads x and dy of its groups twice, the second time from L1 or L2."""
    blocks = tl.cdiv(groups, GROUPS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first_group = (tl.program_id(0) % blocks) * GROUPS
    first_channel = first_group * WIDTH
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    dx += sample * dx_sample_stride + first_channel.to(tl.int64) * channel_stride
    dy += sample * dy_sample_stride + first_channel.to(tl.int64) * dy_channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    group = first_group + tl.minimum(row // WIDTH, GROUPS - 1)
    mean = tl.load(mean_in + sample * groups + group, mask=group < groups, other=0.0)
    rstd = tl.load(rstd_in + sample * groups + group, mask=group < groups, other=0.0)
    channel_sum = sums + sample * channels + first_channel
    sum_stride = samples.to(tl.int64) * channels

    mean1 = tl.zeros([CHANNELS], tl.float32)
    mean2 = tl.zeros([CHANNELS], tl.float32)
    for channel_tile in range(CHANNEL_TILES):
        channel = channel_tile * CHANNELS + row
        exists = (channel < GROUPS * WIDTH) & (first_channel + channel < channels)
        gain, offset = gain_and_offset(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel, exists
        )
        total1 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        total2 = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        for position_tile in range(POSITION_TILES):
            position = position_tile * POSITIONS + column
            inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
            value, dz = _load_normalised_and_dz(
                x, dy, channel, position, inside, mean, rstd, gain, offset, channel_stride, position_stride,
                dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2, DIMENSIONS, SILU,
            )  # fmt: skip
            total1 += dz
            total2 += dz * value
        sum1 = tl.sum(total1, axis=1)
        sum2 = tl.sum(total2, axis=1)
        tl.store(channel_sum + channel, sum1, mask=exists)
        tl.store(channel_sum + sum_stride + channel, sum2, mask=exists)
        mean1 += gain * sum1
        mean2 += gain * sum2
    count = (WIDTH * 1.0) * positions
    mean1 = over_group(mean1, row, WIDTH, GROUPS) / count
    mean2 = over_group(mean2, row, WIDTH, GROUPS) / count

    # Backwards: what was read last is still near.
    for done in range(CHANNEL_TILES * POSITION_TILES):
        tile = CHANNEL_TILES * POSITION_TILES - 1 - done
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        exists = (channel < GROUPS * WIDTH) & (first_channel + channel < channels)
        gain, offset = gain_and_offset(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel, exists
        )
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        value, dz = _load_normalised_and_dz(
            x, dy, channel, position, inside, mean, rstd, gain, offset, channel_stride, position_stride,
            dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2, DIMENSIONS, SILU,
        )  # fmt: skip
        value = rstd[:, None] * (gain[:, None] * dz - mean1[:, None] - value * mean2[:, None])
        at = tile_offset(channel, position, channel_stride, position_stride)
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------- the slab is cut in chunks


@triton.jit(do_not_specialize=plan.VARYING)
def _sums_kernel(
    dy, x, mean_in, rstd_in, partial,  # [N, C, P] twice, [N, G] twice, [2, N, C, chunks]
    weight, bias, scale, shift, scale_stride, shift_stride,
    samples, groups, channels, positions, sample_stride, channel_stride, position_stride,
    dy_sample_stride, dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
    chunks, tiles_each,  # how the tiles of a row of positions are shared out
    DIMENSIONS: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, EXACT: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """A program sums dz and dz xhat over one chunk of the positions of some channels, of any groups."""
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
        value, dz = _load_normalised_and_dz(
            x, dy, channel, position, inside, mean, rstd, gain, offset, channel_stride, position_stride,
            dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2, DIMENSIONS, SILU,
        )  # fmt: skip
        total1 += dz
        total2 += dz * value
    slot = (sample * channels + channel) * chunks + chunk
    tl.store(partial + slot, tl.sum(total1, axis=1), mask=exists)
    tl.store(partial + samples.to(tl.int64) * channels * chunks + slot, tl.sum(total2, axis=1), mask=exists)


@triton.jit(do_not_specialize=plan.VARYING)
def _input_gradient_kernel(
    dy, x, mean_in, rstd_in, dx, partial, sums,  # as above, and [2, N, C]
    weight, bias, scale, shift, scale_stride, shift_stride,
    samples, groups, channels, positions,
    sample_stride, dx_sample_stride, channel_stride, position_stride,
    dy_sample_stride, dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2,
    sum_chunks, chunks, tiles_each,
    DIMENSIONS: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr, EXACT: tl.constexpr, SILU: tl.constexpr,
    MERGE_CHANNELS: tl.constexpr, MERGE_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program merges the sums of its groups and computes dx on one chunk of their slabs."""
    # Backwards: what the first kernel read last is still in L2.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(groups, GROUPS)
    chunk = program % chunks
    block = program // chunks
    sample = (block // blocks).to(tl.int64)
    first_group = (block % blocks) * GROUPS
    first_channel = first_group * WIDTH
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    dx += sample * dx_sample_stride + first_channel.to(tl.int64) * channel_stride
    dy += sample * dy_sample_stride + first_channel.to(tl.int64) * dy_channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    group = first_group + tl.minimum(row // WIDTH, GROUPS - 1)
    mean = tl.load(mean_in + sample * groups + group, mask=group < groups, other=0.0)
    rstd = tl.load(rstd_in + sample * groups + group, mask=group < groups, other=0.0)

    merged = tl.arange(0, MERGE_CHANNELS)
    part = tl.arange(0, MERGE_CHUNKS)
    sum_stride = samples.to(tl.int64) * channels
    mean1 = tl.zeros([MERGE_CHANNELS], tl.float32)
    mean2 = tl.zeros([MERGE_CHANNELS], tl.float32)
    for first in range(0, GROUPS * WIDTH, MERGE_CHANNELS):  # once, except for a group of very many channels
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
        mean1 = over_group(mean1, row, WIDTH, GROUPS) / count
        mean2 = over_group(mean2, row, WIDTH, GROUPS) / count

    position_tiles = tl.cdiv(positions, POSITIONS)
    last_tile = tl.minimum((chunk + 1) * tiles_each, CHANNEL_TILES * position_tiles)
    for tile in range(chunk * tiles_each, last_tile):
        channel = tile // position_tiles * CHANNELS + row
        position = tile % position_tiles * POSITIONS + column
        exists = (channel < GROUPS * WIDTH) & (first_channel + channel < channels)
        gain, offset = gain_and_offset(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel, exists
        )
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        value, dz = _load_normalised_and_dz(
            x, dy, channel, position, inside, mean, rstd, gain, offset, channel_stride, position_stride,
            dy_channel_stride, dy_size0, dy_size1, dy_stride0, dy_stride1, dy_stride2, DIMENSIONS, SILU,
        )  # fmt: skip
        value = rstd[:, None] * (gain[:, None] * dz - mean1[:, None] - value * mean2[:, None])
        at = tile_offset(channel, position, channel_stride, position_stride)
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------- parameter gradients


@triton.jit(do_not_specialize=plan.VARYING)
def _parameters_kernel(
    sums, weight, bias, scale, dweight, dbias, dscale, dshift,  # [2, N, C], then [C], [C], [N, C], ...
    scale_stride, samples, channels,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program takes some channels through all samples, in their order."""
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
    """dx in the layout of x; gradients of weight, bias, scale, shift, of size 0 unless given and wanted."""
    gradients = _backward_fake(dy, x, mean, rstd, weight, bias, scale, shift, silu, parameters)
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
                0 if scale is None else scale.stride(0), samples, channels,
                SAMPLES=32, CHANNELS=16, num_warps=4,  # 64 bytes in a row, 4 values a thread
            )  # fmt: skip
    return gradients


def _input_gradient(dy, x, mean, rstd, dx, sums, weight, bias, scale, shift, silu) -> None:
    """Fills dx and sums."""
    source = plan.view(x)
    dimensions = plan.position_dimensions(dy)
    if dimensions is None:
        dy = dy.contiguous()
        dimensions = plan.position_dimensions(dy)
    (size0, stride0), (size1, stride1), (_, stride2) = (*dimensions, (1, 0), (1, 0))[:3]

    samples, channels = x.shape[:2]
    groups = mean.shape[1]
    width = channels // groups
    shape = (width, groups, source.positions, source.channels_adjacent, x.element_size())
    transposed = not source.channels_adjacent and dy.stride(1) == 1 and channels > 1 and stride0 != 1
    affine = (
        weight, bias, scale, shift,
        0 if scale is None else scale.stride(0),
        0 if shift is None else shift.stride(0),
    )  # fmt: skip
    sizes = (samples, groups, channels, source.positions)
    strides = (source.sample_stride, dx.stride(0), source.channel_stride, source.position_stride)
    dy_strides = (dy.stride(0), dy.stride(1), size0, size1, stride0, stride1, stride2)
    constants = dict(DIMENSIONS=len(dimensions), WIDTH=width, SILU=silu)

    kernel, tiles = _resident_backward_kernel, None
    if not transposed:
        tiles = plan.resident_tiles(*shape, plan.RESIDENT_LANES_BACKWARD)
    if tiles is None:
        kernel = _looped_backward_kernel
        tiles = plan.chunk_tiles(*shape, plan.LOOPED_LANES, plan.LOOPED_WARPS, transposed)
        if 2 * tiles.groups * width * source.positions * x.element_size() > plan.LOOPED_BYTES:
            tiles = None
    if tiles is not None:
        kernel[(samples * plan.divide_up(groups, tiles.groups),)](
            dy, source.tensor, mean, rstd, dx, sums, *affine, *sizes, *strides, *dy_strides,
            GROUPS=tiles.groups, CHANNELS=tiles.channels, POSITIONS=tiles.positions,
            CHANNEL_TILES=tiles.channel_tiles, POSITION_TILES=tiles.position_tiles, EXACT=tiles.exact,
            num_warps=tiles.warps, **constants,
        )  # fmt: skip
        return

    tiles = plan.chunk_tiles(*shape, plan.SUM_LANES, plan.SUM_WARPS, transposed)
    merge_channels = tiles.channels if tiles.groups > 1 else min(plan.power_of_two(width), 128)
    merge_chunks = max(plan.MERGED_VALUES // merge_channels, 1)
    sum_tiles = plan.sum_tiles(
        channels, source.positions, source.channels_adjacent, plan.SUM_LANES, plan.SUM_WARPS, transposed
    )
    sum_blocks = samples * sum_tiles.channel_tiles
    sum_chunks, each = plan.chunks(sum_tiles.position_tiles, sum_blocks, x.device, merge_chunks)
    partial = sums.new_empty((2, samples, channels, sum_chunks))
    _sums_kernel[(sum_blocks * sum_chunks,)](
        dy, source.tensor, mean, rstd, partial, *affine, *sizes, strides[0], *strides[2:], *dy_strides,
        sum_chunks, each,
        CHANNELS=sum_tiles.channels, POSITIONS=sum_tiles.positions, EXACT=sum_tiles.exact,
        num_warps=sum_tiles.warps, **constants,
    )  # fmt: skip
    blocks = samples * plan.divide_up(groups, tiles.groups)
    chunks, each = plan.chunks(tiles.count, blocks, x.device, tiles.count)
    _input_gradient_kernel[(blocks * chunks,)](
        dy, source.tensor, mean, rstd, dx, partial, sums, *affine, *sizes, *strides, *dy_strides,
        sum_chunks, chunks, each,
        GROUPS=tiles.groups, CHANNELS=tiles.channels, POSITIONS=tiles.positions,
        CHANNEL_TILES=tiles.channel_tiles, EXACT=tiles.exact,
        MERGE_CHANNELS=merge_channels, MERGE_CHUNKS=merge_chunks, num_warps=tiles.warps, **constants,
    )  # fmt: skip


def _backward_fake(dy, x, mean, rstd, weight, bias, scale, shift, silu, parameters) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x, memory_format=plan.memory_format(x))
    given = (value if parameters else None for value in (weight, bias, scale, shift))
    return dx, *(
        x.new_empty(0) if value is None else torch.empty_like(value, memory_format=torch.contiguous_format)
        for value in given
    )


group_norm_silu_backward = define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, bool silu, bool parameters) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale, Tensor dshift)",
    run=_backward,
    fake=_backward_fake,
)
