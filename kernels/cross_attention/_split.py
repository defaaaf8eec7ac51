"""The keys of one tile of queries, split among several programs of the long forward kernel, and their merge.

The first `whole` tiles have one program each. The keys of every other tile are split among `parts` programs,
in blocks. Each program stores its sum of p v, not divided, with the maximum and the total of its softmax, in
float32; a second kernel adds them in their order. There are no atomics: equal calls give equal bits. A
counter, so that the last program could merge, would have to be set to 0 by a launch of about the same cost.

The split depends on the batch size, and with it the last bits of a sample's result.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from . import _common
from ._common import VARYING, inverse, locate, log_sum, store_tile

MERGED_ROWS = 16  # of one program of the merge


class Split(NamedTuple):
    """How tiles of queries are cut and assigned to programs.

    rows: queries of a tile.
    whole: tiles that have one program each, the first ones.
    parts: programs that share the keys of each tile that follows; 1 if there is none.
    """

    rows: int
    whole: int
    parts: int


# Times are in units of one tile of 64 queries and 64 keys on a multiprocessor that runs several programs:
# 0.43 us (599 us for 10240 tiles of queries by 18 of keys on 132 multiprocessors, H200, unCLIP batch 64).
_ALONE = 1.5  # a program alone on a multiprocessor waits longer: a prediction, not measured
_MERGE = 4.0  # the launch and the first loads of the merge: a prediction from launches of 1.5 to 2 us
_SLOT = 0.01  # 64 rows of a partial result: 16 KiB written and read in the L2 cache
_LEAST_GAIN = 0.9  # a merge is also one launch more for the host, and must save a tenth of the time on paper


@functools.lru_cache(maxsize=1024)
def plan(
    pairs: int, queries: int, blocks: int, tiles: tuple[tuple[int, float], ...], capability: tuple[int, int]
) -> Split:
    """The split that the model below predicts to be fastest.

    A program per tile fills whole waves of multiprocessors badly if there are few tiles: 320 tiles of 64
    queries (unCLIP batch 2) on 132 multiprocessors end with the three tiles of the busiest, as late as 396
    would. The tiles of the last wave, or all, can be split instead.

    Predictions for an H200, T = 1024, 81 + 1024 keys (18 blocks), D = 64, H = 10, in units:
    batch 1: 36 with 64 queries, 47 with 128; 30 with 128 queries and three parts, which is chosen.
    batch 2: 54 with 64 queries, 63 with 128 (25.5 and 29.8 us were measured); 50 with 64 queries and the 56
    tiles of the last wave in two parts, which is no tenth less, so that nothing is split.
    batch 64: 1404 with 64 queries, 1229 with 128 (599 and 544 us were measured).

    Args:
        pairs: B * H.
        queries: T.
        blocks: blocks of keys, those of the context and of the image together.
        tiles: possible (queries of a tile, time of one tile by one block of keys in the unit above).
        capability: compute capability of the GPU.
    """
    processors = _common.MULTIPROCESSORS.get(capability, 108)

    def time(programs: int, length: int) -> float:
        each = triton.cdiv(programs, processors)
        return each * length * (_ALONE if each == 1 else 1.0)

    best, least = None, 0.0
    for rows, unit in tiles:
        count = pairs * triton.cdiv(queries, rows)
        if best is None or time(count, blocks) * unit < least:
            best, least = Split(rows, count, 1), time(count, blocks) * unit
    least *= _LEAST_GAIN
    for rows, unit in tiles:
        count = pairs * triton.cdiv(queries, rows)
        waves = count // processors
        for whole_waves in {0, waves if waves > 1 else 0}:  # one program alone would be the slowest
            whole = whole_waves * processors
            for parts in range(2, min(blocks, 32) + 1):
                slots = (count - whole) * parts
                length = triton.cdiv(blocks, parts)
                compute = whole_waves * blocks + triton.cdiv(slots, processors) * length
                if not whole:
                    compute = time(slots, length)
                predicted = compute * unit + _MERGE + slots * rows / 64 * _SLOT
                if slots and predicted < least:
                    best, least = Split(rows, whole, parts), predicted
    return best


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    out, lse, sums, statistics, heads, queries, whole, parts,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out and lse of ROWS queries of a tile whose keys were split, from the sums of its programs."""
    slices: tl.constexpr = BLOCK_T // ROWS
    shared = tl.program_id(0) // slices
    tile, batch, head, pair = locate(whole + shared, tl.cdiv(queries, BLOCK_T), heads)
    within = tl.program_id(0) % slices * ROWS + tl.arange(0, ROWS)
    slot = shared.to(tl.int64) * parts
    statistics += slot * (2 * BLOCK_T) + within  # the maximum of each query, then its total
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(statistics + part * (2 * BLOCK_T)))
    shift = tl.where(top == float("-inf"), 0.0, top)
    result = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums += slot * (BLOCK_T * BLOCK_D) + within[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    for part in range(parts):
        factor = tl.exp2(tl.load(statistics + part * (2 * BLOCK_T)) - shift)
        total += factor * tl.load(statistics + part * (2 * BLOCK_T) + BLOCK_T)
        result += factor[:, None] * tl.load(sums + part * (BLOCK_T * BLOCK_D))

    row = tile * BLOCK_T + within
    out_row = heads.to(tl.int64) * WIDTH
    out += batch * queries * out_row + head * WIDTH
    store_tile(out, result * inverse(total)[:, None], row, queries, out_row, WIDTH, BLOCK_D, True)
    tl.store(lse + pair * queries + row, log_sum(shift, total), mask=row < queries)
