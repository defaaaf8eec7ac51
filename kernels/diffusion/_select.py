"""Radix select: the key of a given rank, found one binary digit at a time. Keys are the bits of |x0|."""

from __future__ import annotations

import triton
import triton.language as tl

# Magnitudes are compared as integers: the bits of floats >= 0 have the order of the floats, with infinity and
# then NaN at the end, as in torch.
LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def select(keys, rank):
    """The key of this rank, of keys >= 0. Rank 0 is the smallest."""
    value = rank * 0
    for digit in range(31):
        candidate = value | (1 << (30 - digit))
        smaller = tl.sum((keys < candidate).to(tl.int32))
        value = tl.where(smaller <= rank, candidate, value)
    return value


@triton.jit
def select_two(keys, rank_low, rank_high):
    """The keys of two ranks, of at most 2^14 keys. Ranks below 0 give 0, those past the last give LARGEST."""
    low = rank_low * 0
    high = rank_low * 0
    for digit in range(31):
        candidate_low = low | (1 << (30 - digit))
        candidate_high = high | (1 << (30 - digit))
        # One sum holds both counts, because the time goes into the reduction across the program.
        smaller = tl.sum((keys < candidate_low).to(tl.int32) + ((keys < candidate_high).to(tl.int32) << 16))
        low = tl.where((smaller & 0xFFFF) <= rank_low, candidate_low, low)
        high = tl.where((smaller >> 16) <= rank_high, candidate_high, high)
    return low, high


@triton.jit
def select_listed(list_ptr, count, rank, low, high, TILE: tl.constexpr):
    """The keys of this rank and of the next one, of `count` keys in memory that are all in [low, high]."""
    # The leading digits that low and high have in common are those of all keys.
    digits = tl.sum((((low ^ high) >> tl.arange(0, 32)) > 0).to(tl.int32))
    value = (low >> digits) << digits
    for digit in range(digits):
        candidate = value | (1 << (digits - 1 - digit))
        smaller = rank * 0
        for start in range(0, count, TILE):
            index = start + tl.arange(0, TILE)
            keys = tl.load(list_ptr + index, mask=index < count, other=LARGEST)
            smaller += tl.sum((keys < candidate).to(tl.int32))
        value = tl.where(smaller <= rank, candidate, value)
    not_above = rank * 0
    above = rank * 0 + LARGEST
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        keys = tl.load(list_ptr + index, mask=index < count, other=LARGEST)
        not_above += tl.sum((keys <= value).to(tl.int32))
        above = tl.minimum(above, tl.min(tl.where(keys > value, keys, LARGEST)))
    return value, tl.where(not_above > rank + 1, value, above)
