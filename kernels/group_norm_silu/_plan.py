"""How a group norm is cut into programs: pure functions of shapes, strides and the number of multiprocessors.

A tensor is seen as [N, C, P], with P positions per channel. A *slab* is what one group of one sample is
normalised over: D = C / G channels times P positions. A *tile* [channels, positions], both powers of two, is
what a program processes at once; its *lanes* are its elements. A *chunk* is a part of a slab, some tiles. For
the kernels the layout (positions adjacent: NCHW; channels adjacent: channels_last) is a pair of strides.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._planes import memory_format

# Values that a program keeps in registers from its first read to its last write: 40 per thread with 16 warps.
# With 64 per thread a few spill in channels_last (960 channels at 32x32, Triton 3.9). On an H200 slabs of
# 40960 values took 124 us in registers, where one program fills a multiprocessor, and 107 us when read twice
# ((64, 320, 64, 64), bfloat16).
RESIDENT_LANES = 20480
RESIDENT_LANES_BACKWARD = 16384  # of x and of dy: 32 values of each per thread
RESIDENT_TILES = 20  # loops over them are unrolled; more tiles would only make the code longer

# The forward kernel that reads a slab twice: lanes of a tile, warps, and the largest slab. With 16 values per
# thread two programs run on a multiprocessor and both slabs stay in its L1. On an H200 (64, 320, 64, 64) took
# 100 us in bfloat16. In a sweep in which it took 106 us, tiles of 4096 took 110, 32 warps 113, and 8 warps
# 117 to 126.
FORWARD_LANES, FORWARD_WARPS = 8192, 16
FORWARD_MAX_LANES = 65536
# The kernels that iterate over a chunk: several programs run on a multiprocessor, so that one loads while
# another computes. On an H200 in channels_last (64, 320, 64, 64) took 184 us; 233 with 8 warps, 231 in tiles
# of 2048.
CHUNK_LANES, CHUNK_WARPS = 4096, 4
# The backward kernels have two inputs and two sums. On an H200 (64, 320, 64, 64) took 205 us; 226 in tiles of
# 8192.
LOOPED_LANES, LOOPED_WARPS = 4096, 16
SUM_LANES, SUM_WARPS = 4096, 8
# Bytes of x and dy of one program that reads them twice. With one or two programs on each of 132
# multiprocessors (108 on an A100, 128 on a 4090) they stay in the 40 to 72 MB of L2.
LOOPED_BYTES = 256 * 1024

# Programs per multiprocessor of a kernel over chunks, and the fewest tiles of a program. Many waves of
# programs leave only a small part of the last wave idle. On an H200 in NCHW (8, 320, 256, 256) took 261 us
# with 64, 263 with 32, 270 with 16; in channels_last, where programs take longer to begin and to end, (64,
# 320, 64, 64) took 184 with 8 and 187 with 16. A program with a single tile would spend most of its time on
# beginning and ending.
ROW_PROGRAMS, COLUMN_PROGRAMS, MIN_TILES = 64, 8, 2
MAX_CHUNKS = 128  # chunks of a slab whose moments the second kernel merges at once
MERGED_MOMENTS = 512  # the largest chunks * groups of a program that merges moments
MERGED_VALUES = 4096  # the largest chunks * channels of a program that merges sums (backward)
# Arguments of kernels that depend on the batch, the device or how a caller stores its FiLM embedding. Triton
# does not specialise on them: no kernel is compiled again when one of them becomes 1 or divisible by 16.
VARYING = (
    "samples", "groups", "slabs", "chunks", "tiles_each", "sum_chunks", "scale_stride", "shift_stride",
    "dgain_stride", "doffset_stride",
)  # fmt: skip
SECTOR = 32  # bytes; the smallest unit that a GPU's L2 transfers


class Tiles(NamedTuple):
    """Tiles of one program, which covers `groups` groups. Only with groups = 1 it may need several tiles of
    channels."""

    groups: int
    channels: int
    positions: int
    channel_tiles: int
    position_tiles: int
    warps: int
    exact: bool  # the tiles cover the groups without padding in every program, so the kernel needs no masks

    @property
    def count(self) -> int:
        return self.channel_tiles * self.position_tiles

    @property
    def lanes(self) -> int:
        return self.channels * self.positions * self.count


def power_of_two(value: int) -> int:
    """The smallest power of two >= value."""
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
    """Warps for about 20 to 40 values per thread. More hide latency better, fewer synchronise less."""
    if lanes > 10240:
        return 16
    if lanes > 4096:
        return 8
    return 4 if lanes > 512 else 1


# ---------------------------------------------------------------------------------- positions adjacent (NCHW)


def _row_tiles(width: int, count: int, length: int, lanes: int, warps: int) -> Tiles:
    """Tiles of `lanes` to `lanes` / 4 lanes that cover [width, length] with the least padding."""
    best, lowest_cost = None, None
    for shrink in (1, 2, 4):  # a thread then loads 16, 8, 4 bytes of bfloat16 at once
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
    """Groups of a program that takes whole slabs: the fewest that fill a sector and end at a multiple of 4 B.

    Few groups make many programs, so that more multiprocessors have work at batch 2. A sector that two
    programs share is read twice from L2, but once from memory.
    """
    groups = 1
    while groups < count and (groups * width * itemsize < SECTOR or groups * width * itemsize % 4):
        groups += 1
    return groups


def _column_groups(width: int, count: int, itemsize: int, max_channels: int) -> int:
    """Groups per program with which it reads whole sectors, in large vectors, with few idle lanes."""
    best, lowest_cost = 1, None
    for groups in range(1, count + 1):
        covered = groups * width
        channels = power_of_two(covered)
        if groups > 1 and channels > max_channels:
            break
        run = covered * itemsize  # adjacent bytes; they begin at a multiple of run from the base
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
    """Tiles that hold a slab in registers from the first read to the write, or None if it does not fit."""
    if width * length > max_lanes:
        return None
    # 8 values per thread and tile: one load of 16 bytes in bfloat16, and few registers for the running sum.
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
    """Tiles of `lanes` lanes for a program that reads slabs twice, or None if a slab exceeds `max_lanes`."""
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
    """Tiles of `lanes` lanes for programs that iterate over a slab.

    transposed: the channels of dy are adjacent, and the positions of x. A tile with all channels of a group
    reads each sector of dy once or twice; a tile with one channel would use only 2 bytes of a sector.
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
    """Tiles of [C, P] for sums over positions, regardless of groups: the field `groups` has no meaning."""
    if channels_adjacent or transposed:
        size = min((64, 128, 32), key=lambda size: divide_up(channels, size) * size)
        size = min(size, power_of_two(channels))
        return _tiles(1, size, min(lanes // size, power_of_two(length)), channels, 1, length, warps)
    return _row_tiles(channels, 1, length, min(lanes, power_of_two(channels) * power_of_two(length)), warps)


def chunks(
    tiles: int, slabs: int, device: torch.device, max_chunks: int, channels_adjacent: bool
) -> tuple[int, int]:
    """(chunks of a slab, tiles per chunk) such that all multiprocessors are busy."""
    programs = (COLUMN_PROGRAMS if channels_adjacent else ROW_PROGRAMS) * processors(device)
    each = divide_up(tiles, min(divide_up(programs, slabs), max_chunks, divide_up(tiles, MIN_TILES)))
    return divide_up(tiles, each), each


def merged_chunks(tiles: Tiles) -> int:
    """The largest number of chunks whose moments the second kernel merges, a power of two."""
    return min(power_of_two(tiles.count), MAX_CHUNKS, max(MERGED_MOMENTS // power_of_two(tiles.groups), 1))


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Number of multiprocessors. In Triton's interpreter it is 1, so that tests see chunks of many tiles."""
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
        """Whether offsets within a sample need 64 bits."""
        return self.tensor.shape[1:].numel() >= 2**31


def view(x: Tensor) -> View:
    """x as [N, C, P] in its memory format.

    It is copied only if its samples are neither contiguous nor channels_last. A slice of the batch or of the
    channels of a contiguous tensor is read in place.
    """
    channels, positions = x.shape[1], math.prod(x.shape[2:])
    layout = memory_format(x)
    if layout is not torch.contiguous_format or positions == 1:
        x = x.contiguous(memory_format=layout)
        return View(x, x.stride(0), 1, channels, positions)
    if not x[:1].is_contiguous():
        x = x.contiguous()
    return View(x, x.stride(0), positions, 1, positions)


def position_dimensions(x: Tensor) -> list[tuple[int, int]] | None:
    """(size, stride) of the dimensions of P, the innermost first, merged if possible; None if over three."""
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
    """[N, C] or [C] with adjacent channels. A slice of a larger embedding is read in place."""
    return value if value is None or value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def row_stride(value: Tensor | None) -> int:
    """Stride from one sample to the next, of [N, C]."""
    return 0 if value is None else value.stride(0)
