"""y = act((x - mean) rstd weight (1 + scale) + bias (1 + scale) + shift), mean and rstd over a sample's group

Group norm, an optional scale and shift per sample (FiLM) and SiLU. One kernel where a group's slab fits
into the registers of a program (1 read and 1 write, 4 bytes an element in bfloat16) or into the nearer
caches (a second read, of L1 or L2); two where it does not (the second read of L2, where the tensor fits
into that). Every sum, also of squares, is of x less a number near the slab's mean: a mean of 1e3 with sigma
1 costs no accuracy.

The op runs in the dtype of x, also under autocast; the maths is float32, rounded once. Its gradient is in
backward.py. What a program covers is decided in _plan.py, where the nouns are explained.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._op import define, differentiate
from . import _plan as plan
from ._tile import (
    add_pairs,
    gain_and_offset,
    inside_block,
    inside_tile,
    leads_group,
    load_pivot,
    of_groups,
    over_group,
    place_groups,
    store_normalised,
    tile_offset,
)
from .backward import group_norm_silu_backward


@triton.jit
def _mean_and_variance(total, squares, count, row, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """For each row, of its group: mean less the pivot and variance, from each lane's sum and sum of squares.

    Of the digits (pivot - mean)^2 / variance cancel: that takes a pivot near the mean (load_pivot)."""
    total, squares = tl.reduce((total, squares), 1, add_pairs)
    mean = over_group(total, row, WIDTH, GROUPS) / count
    squares = over_group(squares, row, WIDTH, GROUPS) / count
    return mean, tl.maximum(squares - mean * mean, 0.0)


# ---------------------------------------------------------------------------------------------- the slab fits


@triton.jit(do_not_specialize=plan.VARYING)
def _resident_kernel(
    x, y, mean_out, rstd_out,  # [N, C, P] twice, [N, G] twice
    weight, bias, scale, shift,  # [C], [C], [N, C], [N, C] or None
    eps, scale_stride, shift_stride,
    groups, channels, positions,  # G, C, P
    sample_stride, y_sample_stride, channel_stride, position_stride,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,  # D = C / G
    GROUPS: tl.constexpr,  # that a program covers
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,  # of a tile
    CHANNEL_TILES: tl.constexpr, POSITION_TILES: tl.constexpr, EXACT: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """A program reads the slabs of its groups, keeps them in registers, and writes them normalised."""
    sample, first_group, first_channel = place_groups(tl.program_id(0), groups, WIDTH, GROUPS)
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
        at = tile_offset(channel, position, channel_stride, position_stride, WIDE)
        value = tl.load(x + at, mask=inside, other=0.0)
        total += value.to(tl.float32)
        tiles += (value,)
        if tile % POSITION_TILES == 0:  # on their way while x is
            gain, offset = gain_and_offset(
                weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel,
                inside_block(channel, GROUPS * WIDTH, first_channel, channels, EXACT),
            )  # fmt: skip
            gains += (gain,)
            offsets += (offset,)
    # The mean of large numbers is rounded; what it lacks is found with the squares about it.
    pivot = over_group(tl.sum(total, axis=1), row, WIDTH, GROUPS) / count

    total = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    squares = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for tile in tl.static_range(CHANNEL_TILES * POSITION_TILES):
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        centred = tl.where(inside, tiles[tile].to(tl.float32) - pivot[:, None], 0.0)
        total += centred
        squares += centred * centred
    mean, variance = _mean_and_variance(total, squares, count, row, WIDTH, GROUPS)
    rstd = tl.rsqrt(variance + eps)

    # A group's numbers are written by the row of its first channel.
    group = sample * groups + first_group + row // WIDTH
    leads = leads_group(row, first_channel, channels, WIDTH, GROUPS)
    tl.store(mean_out + group, pivot + mean, mask=leads)
    tl.store(rstd_out + group, rstd, mask=leads)

    for tile in tl.static_range(CHANNEL_TILES * POSITION_TILES):
        channel = tile // POSITION_TILES * CHANNELS + row
        position = tile % POSITION_TILES * POSITIONS + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        at = tile_offset(channel, position, channel_stride, position_stride, WIDE)
        gain, offset = gains[tile // POSITION_TILES], offsets[tile // POSITION_TILES]
        store_normalised(y, at, tiles[tile], pivot, mean, rstd, gain, offset, inside, SILU)


# ----------------------------------------------------------------------- the slab fits into the nearer caches


@triton.jit(do_not_specialize=plan.VARYING)
def _looped_kernel(
    x, y, mean_out, rstd_out,
    weight, bias, scale, shift, eps, scale_stride, shift_stride,
    groups, channels, positions, sample_stride, y_sample_stride, channel_stride, position_stride,
    WIDE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr, POSITION_TILES: tl.constexpr, EXACT: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """A program reads the slabs of its groups twice, the second time from L1 or L2."""
    sample, first_group, first_channel = place_groups(tl.program_id(0), groups, WIDTH, GROUPS)
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
        at = tile_offset(channel, position, channel_stride, position_stride, WIDE)
        value = tl.load(x + at, mask=inside, other=0.0)
        centred = tl.where(inside, value.to(tl.float32) - pivot[:, None], 0.0)
        total += centred
        squares += centred * centred

    # Backwards: what was read last is still near. Gains and offsets come a tile ahead.
    last = CHANNEL_TILES * CHANNELS - CHANNELS + row
    gain, offset = gain_and_offset(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + last,
        inside_block(last, GROUPS * WIDTH, first_channel, channels, EXACT),
    )  # fmt: skip
    mean, variance = _mean_and_variance(total, squares, (WIDTH * 1.0) * positions, row, WIDTH, GROUPS)
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
        at = tile_offset(channel, position, channel_stride, position_stride, WIDE)
        value = tl.load(x + at, mask=inside, other=0.0, eviction_policy="evict_first")
        store_normalised(y, at, value, pivot, mean, rstd, gain, offset, inside, SILU)
        if CHANNEL_TILES > 1:
            following = tl.maximum(tile - 1, 0) // POSITION_TILES * CHANNELS + row
            gain, offset = gain_and_offset(
                weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + following,
                inside_block(following, GROUPS * WIDTH, first_channel, channels, EXACT),
            )  # fmt: skip


# ---------------------------------------------------------------------------------- the slab is cut in chunks


@triton.jit(do_not_specialize=plan.VARYING)
def _moments_kernel(
    x, partial,  # [N, C, P], [4, N, G, chunks]: count, mean less the pivot, squares about the mean, the pivot
    groups, channels, positions, sample_stride, channel_stride, position_stride,
    slabs, chunks, tiles_each,  # N G, and how the tiles of a slab are shared out
    WIDE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNEL_TILES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A program takes the moments of one chunk of its groups' slabs."""
    chunk = tl.program_id(0) % chunks
    sample, first_group, first_channel = place_groups(tl.program_id(0) // chunks, groups, WIDTH, GROUPS)
    x += sample * sample_stride + first_channel.to(tl.int64) * channel_stride
    row = tl.arange(0, CHANNELS)
    column = tl.arange(0, POSITIONS)
    pivot = load_pivot(
        x, row, first_channel, channels, positions, channel_stride, position_stride, WIDTH, GROUPS
    )

    position_tiles = tl.cdiv(positions, POSITIONS)
    last_tile = tl.minimum((chunk + 1) * tiles_each, CHANNEL_TILES * position_tiles)
    # A lane adds up its own; threads meet once, after the loop, for it takes barriers.
    count = 0.0
    total = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    squares = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for tile in tl.range(chunk * tiles_each, last_tile, loop_unroll_factor=2):
        channel = tile // position_tiles * CHANNELS + row
        first_position = tile % position_tiles * POSITIONS
        position = first_position + column
        inside = inside_tile(channel, GROUPS * WIDTH, first_channel, channels, position, positions, EXACT)
        at = tile_offset(channel, position, channel_stride, position_stride, WIDE)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, value - pivot[:, None], 0.0)
        total += centred
        squares += centred * centred
        rows = tl.minimum(WIDTH - tile // position_tiles * CHANNELS, CHANNELS)  # of a group
        count += 1.0 * rows * tl.minimum(positions - first_position, POSITIONS)

    mean, variance = _mean_and_variance(total, squares, count, row, WIDTH, GROUPS)
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
    WIDE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNEL_TILES: tl.constexpr, EXACT: tl.constexpr,
    SILU: tl.constexpr, MOST_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program merges the moments of its groups and normalises one chunk of their slabs."""
    # Backwards: what the first kernel read last is still in L2.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = program % chunks
    sample, first_group, first_channel = place_groups(program // chunks, groups, WIDTH, GROUPS)
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
    part = tl.arange(0, MOST_CHUNKS)
    group_exists = (member < GROUPS) & (first_group + member < groups)
    slot = (sample * groups + first_group + member) * chunks
    exists = group_exists[:, None] & (part < chunks)[None, :]
    stride = slabs.to(tl.int64) * chunks
    counts = tl.load(partial + slot[:, None] + part[None, :], mask=exists, other=0.0)
    means = tl.load(partial + stride + slot[:, None] + part[None, :], mask=exists, other=0.0)
    squares = tl.load(partial + 2 * stride + slot[:, None] + part[None, :], mask=exists, other=0.0)
    group_pivot = tl.load(partial + 3 * stride + slot, mask=group_exists, other=0.0)  # of every chunk
    # The moments of sets together (Chan, Golub, LeVeque 1979).
    count = (WIDTH * 1.0) * positions
    group_mean = tl.sum(counts * means, axis=1) / count
    difference = means - group_mean[:, None]
    group_rstd = tl.rsqrt(tl.sum(squares + counts * difference * difference, axis=1) / count + eps)
    pivot, mean, rstd = of_groups(group_pivot, group_mean, group_rstd, row, WIDTH, GROUPS)
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
        at = tile_offset(channel, position, channel_stride, position_stride, WIDE)
        value = tl.load(x + at, mask=inside, other=0.0)
        if CHANNEL_TILES > 1:
            gain, offset = gain_and_offset(
                weight, bias, scale, shift, scale_stride, shift_stride, sample, first_channel + channel,
                inside_block(channel, GROUPS * WIDTH, first_channel, channels, EXACT),
            )  # fmt: skip
        store_normalised(y, at, value, pivot, mean, rstd, gain, offset, inside, SILU)


# ----------------------------------------------------------------------------------------------------- launch


def _forward(
    x: Tensor,  # [N, C, *]
    num_groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    scale: Tensor | None,  # [N, C]
    shift: Tensor | None,  # [N, C]
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, C, *] in the layout of x, mean and rstd [N, G] in float32."""
    y, mean, rstd = _forward_fake(x, num_groups, weight, bias, eps, scale, shift, silu)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    source = plan.view(x)
    weight, bias, scale, shift = (plan.rows(value) for value in (weight, bias, scale, shift))
    samples, channels = x.shape[:2]
    width = channels // num_groups
    shape = (width, num_groups, source.positions, source.channels_adjacent, x.element_size())
    affine = (weight, bias, scale, shift, eps, plan.row_stride(scale), plan.row_stride(shift))
    sizes = (num_groups, channels, source.positions)
    strides = (source.sample_stride, y.stride(0), source.channel_stride, source.position_stride)
    with torch.cuda.device_of(x):
        kernel, tiles = _resident_kernel, plan.resident_tiles(*shape, plan.RESIDENT_LANES)
        if tiles is None:
            kernel = _looped_kernel
            tiles = plan.forward_tiles(*shape, plan.FORWARD_LANES, plan.FORWARD_WARPS, plan.FORWARD_MOST)
        if tiles is not None:
            kernel[(samples * plan.divide_up(num_groups, tiles.groups),)](
                source.tensor, y, mean, rstd, *affine, *sizes, *strides,
                WIDE=source.wide, WIDTH=width, GROUPS=tiles.groups,
                CHANNELS=tiles.channels, POSITIONS=tiles.positions,
                CHANNEL_TILES=tiles.channel_tiles, POSITION_TILES=tiles.position_tiles, EXACT=tiles.exact,
                SILU=silu, num_warps=tiles.warps,
            )  # fmt: skip
            return y, mean, rstd

        tiles = plan.chunk_tiles(*shape, plan.CHUNK_LANES, plan.CHUNK_WARPS)
        blocks = samples * plan.divide_up(num_groups, tiles.groups)
        most_chunks = plan.merged_chunks(tiles)
        chunks, each = plan.chunks(tiles.count, blocks, x.device, most_chunks, source.channels_adjacent)
        slabs = samples * num_groups
        partial = mean.new_empty((4, slabs, chunks))
        constants = dict(
            WIDE=source.wide, WIDTH=width, GROUPS=tiles.groups,
            CHANNELS=tiles.channels, POSITIONS=tiles.positions,
            CHANNEL_TILES=tiles.channel_tiles, EXACT=tiles.exact, num_warps=tiles.warps,
        )  # fmt: skip
        _moments_kernel[(blocks * chunks,)](
            source.tensor, partial, *sizes, strides[0], *strides[2:], slabs, chunks, each, **constants
        )
        _apply_kernel[(blocks * chunks,)](
            source.tensor, y, mean, rstd, partial, *affine, *sizes, *strides, slabs, chunks, each,
            **constants, SILU=silu, MOST_CHUNKS=most_chunks,
        )  # fmt: skip
    return y, mean, rstd


# ----------------------------------------------------------------------------------------------- registration


def _forward_fake(x, num_groups, weight, bias, eps, scale, shift, silu) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=plan.memory_format(x))
    statistics = (x.shape[0], num_groups)
    mean = torch.empty(statistics, dtype=torch.float32, device=x.device)
    return y, mean, torch.empty_like(mean)


group_norm_silu = define(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
    "Tensor? shift, bool silu) -> (Tensor y, Tensor mean, Tensor rstd)",
    run=_forward,
    fake=_forward_fake,
)


def _save(ctx, inputs, output) -> None:
    x, _, weight, bias, _, scale, shift, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)


def _backward(ctx, dy, _dmean, _drstd):
    _, _, weight, bias, _, scale, shift, _ = ctx.needs_input_grad
    gradients = group_norm_silu_backward(
        dy, *ctx.saved_tensors, ctx.silu, weight or bias or scale or shift
    )  # of size 0 where not asked for
    dx, dweight, dbias, dscale, dshift = gradients
    return (
        dx, None, dweight if weight else None, dbias if bias else None, None,
        dscale if scale else None, dshift if shift else None, None,
    )  # fmt: skip


differentiate(group_norm_silu, save=_save, backward=_backward)
