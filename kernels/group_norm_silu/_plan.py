"""How a group norm is cut into programs: pure functions of shapes, strides and the number of processors.

A tensor is seen as [N, C, P], P positions a channel. A *slab* is what one group of one sample normalises
over: D = C / G channels times P positions. Kernels work on tiles of [channels, positions], both powers of
two; the layout (positions adjacent: NCHW; channels adjacent: channels_last) is a pair of strides to them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._planes import memory_format

# Values that a program keeps in registers from its first read to its last write: 40 a thread with 16 warps;
# with 64 a few spill in channels_last (960 channels at 32x32, Triton 3.9). On an H200 a slab of 40960 took
# 124 us so, alone on its multiprocessor, and 107 read twice ((64, 320, 64, 64), bfloat16).
RESIDENT_LANES = 20480
RESIDENT_LANES_BACKWARD = 16384  # of x and of dy, 32 values of each a thread
RESIDENT_TILES = 20  # they are unrolled; more would only lengthen the code

# A tile of the forward kernel that reads a slab twice, 16 values a thread so that two programs share a
# multiprocessor and both slabs its L1, and the most values of a slab. On an H200 (64, 320, 64, 64) took 100
# us in bfloat16; in a sweep where it took 106, 110 in tiles of 4096, 113 with 32 warps, 117 to 126 with 8.
FORWARD_LANES, FORWARD_WARPS = 8192, 16
FORWARD_MAX_LANES = 65536
# A tile of the kernels that walk through a chunk: programs share a processor, one loads, another computes. On
# an H200 in channels_last (64, 320, 64, 64) took 184 us; 233 with 8 warps, 231 in tiles of 2048.
CHUNK_LANES, CHUNK_WARPS = 4096, 4
# Backward has two inputs and two sums. On an H200 (64, 320, 64, 64) took 205 us, 226 in tiles of 8192.
LOOPED_LANES, LOOPED_WARPS = 4096, 16
SUM_LANES, SUM_WARPS = 4096, 8
# x and dy of one program that reads them twice: with a program or two on each of 132 processors (or 108 of an
# A100, 128 of a 4090) they stay within 40 to 72 MB of L2.
LOOPED_BYTES = 256 * 1024

# Of a kernel over chunks: waves enough for the last one's gap to be small. On an H200 in NCHW (8, 320, 256,
# 256) took 261 us with 64, 263 with 32, 270 with 16; in channels_last (64, 320, 64, 64), where a program
# takes longer to begin and to end, 184 with 8, 187 with 16. A program of a single tile would do little else.
ROW_PROGRAMS, COLUMN_PROGRAMS, MIN_TILES = 64, 8, 2
MAX_CHUNKS = 128  # partial results of a slab that the second kernel merges at once
MERGED_MOMENTS = 512  # the same, times groups
MERGED_VALUES = 4096  # the same, times channels, for the sums of the backward pass
# Arguments of kernels that change with the batch, the device or how a caller stores its FiLM embedding: no
# kernel is compiled again because one of them becomes 1 or divisible by 16.
VARYING = (
    "samples", "groups", "slabs", "chunks", "tiles_each", "sum_chunks", "scale_stride", "shift_stride",
)  # fmt: skip
SECTOR = 32  # bytes; the least that a GPU's L2 moves


class Tiles(NamedTuple):
    """Tiles of one program. A program covers `groups` groups; only with groups = 1 may it need several tiles
    of channels."""

    groups: int
    channels: int
    positions: int
    channel_tiles: int
    position_tiles: int
    warps: int
    exact: bool  # the tiles cover the block without padding, in every program: no masks

    @property
    def count(self) -> int:
        return self.channel_tiles * self.position_tiles

    @property
    def lanes(self) -> int:
        return self.channels * self.positions * self.count


def power_of_two(value: int) -> int:
    """The least power of two >= value."""
    return 1 << max(value - 1, 0).bit_length()


def divide_up(value: int, by: int) -> int:
    return -(-value // by)


def _tiles(
    groups: int, channels: int, positions: int, width: int, count: int, length: int, warps: int
) -> Tiles:
    """width = D, count = G, length = P."""
    covered = groups * width
    exact = covered % channels == 0 and count % groups == 0 and length % positions == 0
    return Tiles(
        groups, channels, positions, divide_up(covered, channels), divide_up(length, positions), warps, exact
    )


def _warps(lanes: int) -> int:
    """About 20 to 40 values a thread; more warps hide latency better, fewer have less to synchronise."""
    if lanes > 10240:
        return 16
    if lanes > 4096:
        return 8
    return 4 if lanes > 512 else 1


# ---------------------------------------------------------------------------------- positions adjacent (NCHW)


def _row_tiles(width: int, count: int, length: int, lanes: int, warps: int) -> Tiles:
    """The tiles of `lanes` or somewhat fewer lanes that cover [width, length] with the least padding."""
    best, lowest_cost = None, None
    for shrink in (1, 2, 4):  # a thread's vector shrinks with the tile: 16, 8, 4 bytes of bfloat16
        size = max(lanes // shrink, 32)
        positions = size
        while positions >= 1:
            channels = size // positions
            if positions < 2 * power_of_two(length) and channels < 2 * power_of_two(width):
                tiles = _tiles(1, channels, positions, width, count, length, warps)
                cost = tiles.lanes * (1 + 0.1 * (shrink - 1)) + 32 * tiles.count
                if lowest_cost is None or cost < lowest_cost:
                    best, lowest_cost = tiles, cost
            positions //= 2
    if best is None:  # the slab is smaller than the smallest tile
        best = _tiles(1, power_of_two(width), power_of_two(length), width, count, length, warps)
    return best


# -------------------------------------------------------------------------- channels adjacent (channels_last)


def _few_groups(width: int, count: int, itemsize: int) -> int:
    """The fewest groups whose channels fill a sector and part at multiples of 4 bytes, of those programs that
    take whole slabs: the more programs there are, the more processors have work at batch 2. Sectors that two
    programs share come from L2 twice, from memory once."""
    groups = 1
    while groups < count and (groups * width * itemsize < SECTOR or groups * width * itemsize % 4):
        groups += 1
    return groups


def _column_groups(width: int, count: int, itemsize: int, max_channels: int) -> int:
    """How many groups a program takes, so that it reads whole sectors in wide vectors with few idle lanes."""
    best, lowest_cost = 1, None
    for groups in range(1, count + 1):
        covered = groups * width
        channels = power_of_two(covered)
        if groups > 1 and channels > max_channels:
            break
        run = covered * itemsize  # bytes in a row, at multiples of run (and of C) from the base
        aligned = math.gcd(run, SECTOR) if groups < count else math.gcd(count * width * itemsize, SECTOR)
        sectors = (run + SECTOR - aligned) / run
        idle = channels * divide_up(count, groups) / (width * count)
        vector = min(math.gcd(aligned, 16), 16)
        cost = sectors + idle + 0.25 * (16 // vector).bit_length()
        if lowest_cost is None or cost < lowest_cost - 1e-9:
            best, lowest_cost = groups, cost
    return best


def _column_tiles(width: int, count: int, length: int, groups: int, lanes: int, warps: int) -> Tiles:
    channels = min(power_of_two(groups * width), 256 if groups == 1 else 1 << 30)
    positions = min(max(lanes // channels, 1), power_of_two(length))
    return _tiles(groups, channels, positions, width, count, length, warps)


# ---------------------------------------------------------------------------------------------------- choices


@lru_cache(maxsize=4096)
def resident_tiles(
    width: int,  # D
    count: int,  # G
    length: int,  # P
    channels_adjacent: bool,
    itemsize: int,
    max_lanes: int,
) -> Tiles | None:
    """Tiles that hold a slab in registers from the first read to the write; None where it does not fit."""
    if width * length > max_lanes:
        return None
    # 8 values a thread and tile: one load of 16 bytes of bfloat16, and few registers for the running sum.
    if not channels_adjacent:
        warps = _warps(width * length)
        tiles = _row_tiles(width, count, length, 256 * warps, warps)
    else:
        groups = _few_groups(width, count, itemsize)
        warps = _warps(power_of_two(groups * width) * power_of_two(length))
        tiles = _column_tiles(width, count, length, groups, 256 * warps, warps)
    if tiles.lanes > max_lanes or tiles.count > RESIDENT_TILES:
        return None
    return tiles


@lru_cache(maxsize=4096)
def forward_tiles(
    width: int, count: int, length: int, channels_adjacent: bool, itemsize: int, lanes: int, warps: int,
    max_lanes: int,
) -> Tiles | None:  # fmt: skip
    """Tiles of `lanes` for a program that reads slabs twice; None where they are too large to stay near."""
    if channels_adjacent:
        groups = _few_groups(width, count, itemsize)
        tiles = _column_tiles(width, count, length, groups, lanes, warps)
    else:
        tiles = _row_tiles(width, count, length, lanes, warps)
    return tiles if tiles.lanes <= max_lanes else None


@lru_cache(maxsize=4096)
def chunk_tiles(
    width: int, count: int, length: int, channels_adjacent: bool, itemsize: int, lanes: int, warps: int,
    transposed: bool = False,
) -> Tiles:  # fmt: skip
    """Tiles of `lanes` for programs that walk through a slab.

    transposed: dy has its channels adjacent though x has its positions. A tile that takes all channels of a
    group reads each sector of dy once or twice, one of a single channel would read it for 2 bytes.
    """
    if channels_adjacent:
        groups = _column_groups(width, count, itemsize, max_channels=256)
        return _column_tiles(width, count, length, groups, lanes, warps)
    if transposed:
        channels = min(power_of_two(width), 64)
        return _tiles(1, channels, min(lanes // channels, power_of_two(length)), width, count, length, warps)
    return _row_tiles(width, count, length, min(lanes, power_of_two(width) * power_of_two(length)), warps)


@lru_cache(maxsize=4096)
def sum_tiles(
    channels: int, length: int, channels_adjacent: bool, lanes: int, warps: int, transposed: bool = False
) -> Tiles:
    """Tiles of [C, P] for sums over positions, which need not respect the groups: `groups` means nothing."""
    if channels_adjacent or transposed:
        size = min((64, 128, 32), key=lambda size: divide_up(channels, size) * size)
        size = min(size, power_of_two(channels))
        return _tiles(1, size, min(lanes // size, power_of_two(length)), channels, 1, length, warps)
    return _row_tiles(channels, 1, length, min(lanes, power_of_two(channels) * power_of_two(length)), warps)


def chunks(
    tiles: int, slabs: int, device: torch.device, max_chunks: int, channels_adjacent: bool
) -> tuple[int, int]:
    """(chunks, tiles of a chunk): a slab's tiles shared among programs so that the processors are busy."""
    programs = (COLUMN_PROGRAMS if channels_adjacent else ROW_PROGRAMS) * processors(device)
    each = divide_up(tiles, min(divide_up(programs, slabs), max_chunks, divide_up(tiles, MIN_TILES)))
    return divide_up(tiles, each), each


def merged_chunks(tiles: Tiles) -> int:
    """The most chunks whose moments the second kernel merges, a power of two."""
    return min(power_of_two(tiles.count), MAX_CHUNKS, max(MERGED_MOMENTS // power_of_two(tiles.groups), 1))


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; in Triton's interpreter one, so that tests come to chunks of many tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# ----------------------------------------------------------------------------------------------------- layout


class View(NamedTuple):
    """A tensor as [N, C, P]."""

    tensor: Tensor
    sample_stride: int
    channel_stride: int
    position_stride: int
    positions: int

    @property
    def channels_adjacent(self) -> bool:
        return self.channel_stride == 1

    @property
    def int64_offsets(self) -> bool:
        """Whether an offset within a sample takes 64 bits."""
        return self.tensor.shape[1:].numel() >= 2**31


def view(x: Tensor) -> View:
    """x as [N, C, P] in its memory format. Copied only where a sample of it is neither contiguous nor
    channels_last; a part of the batch or of the channels of a contiguous tensor is read in place."""
    channels, positions = x.shape[1], math.prod(x.shape[2:])
    layout = memory_format(x)
    if layout is not torch.contiguous_format or positions == 1:
        x = x.contiguous(memory_format=layout)
        return View(x, x.stride(0), 1, channels, positions)
    if not x[:1].is_contiguous():
        x = x.contiguous()
    return View(x, x.stride(0), positions, 1, positions)


def position_dimensions(x: Tensor) -> list[tuple[int, int]] | None:
    """(size, stride) of the dimensions of P, neighbours merged, the innermost first. None if over three."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    return (merged or [(1, 0)]) if len(merged) <= 3 else None


def rows(value: Tensor | None) -> Tensor | None:
    """[N, C] or [C] with adjacent channels; a half of a wider embedding is read in place."""
    return value if value is None or value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def row_stride(value: Tensor | None) -> int:
    """From one sample's row to the next, of [N, C]."""
    return 0 if value is None else value.stride(0)
