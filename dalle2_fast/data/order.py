"""The order in which the samples of shards are read: a function of (seed, position), reached at once.

In pass e the shards are shuffled with (seed, e), neighbours in this order are put into groups of at least
`shuffle` samples, and the samples of each group are shuffled. Position g is the sample at place g mod N of
pass g div N, where N is the number of samples. Each pass has every sample once, reads stay within a few
shards, and no position needs what lies before it. Shuffling sorts by SplitMix64, because the random
generators of numpy may give other numbers in a later version, and a resumed run would read another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dalle2_fast.seeds import mix_seed

VERSION = 2  # recorded in run.json; 1 was the shuffle buffer of webdataset
NEAR = 8  # replacements that are looked for in the group, where reads are cheap, before others


class Order:
    """Position -> (shard, row).

    Args:
        lengths: the number of samples of each shard.
        seed: of the order.
        shuffle: the least number of samples that are shuffled together; 0 keeps the order of the shards and
            of their samples.

    Example:
        >>> order = Order([2, 0, 1], seed=0, shuffle=0)
        >>> [order.locate(position) for position in range(4)]
        [(0, 0), (0, 1), (2, 0), (0, 0)]
    """

    def __init__(self, lengths: Sequence[int], seed: int, shuffle: int) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self.total = int(self._lengths.sum())
        self._seed, self._shuffle = seed, shuffle
        self._pass: _Pass | None = None

    def locate(self, position: int, attempt: int = 0) -> tuple[int, int]:
        """The sample at a position, >= 0.

        Args:
            position: of all passes together.
            attempt: 0 for the sample itself; 1, 2, ... for those that take its place if it cannot be used.

        Returns:
            (shard, row).
        """
        epoch, place = divmod(position, self.total)
        if self._pass is None or self._pass.epoch != epoch:
            self._pass = _Pass(self._lengths, self._seed, epoch, self._shuffle)
        if attempt:
            begin, end = self._pass.group_of(place) if attempt <= NEAR else (0, self.total)
            drawn = mix_seed(self._seed, position, min(attempt, NEAR + 1))
            place = begin + (drawn + max(0, attempt - NEAR - 1)) % (end - begin)
        return self._pass.locate(place)


class _Pass:
    """One pass over the shards."""

    def __init__(self, lengths: np.ndarray, seed: int, epoch: int, shuffle: int) -> None:
        self.epoch, self._seed, self._shuffle = epoch, seed, shuffle
        self._shards = np.arange(len(lengths))
        if shuffle:
            self._shards = _permutation(mix_seed(seed, epoch), len(lengths))
        self._ends = np.cumsum(lengths[self._shards])  # of the shards, in the order of this pass
        self._groups = self._ends[-1:]  # ends of the groups
        if shuffle:
            groups = [0]
            while groups[-1] < self._ends[-1]:
                first = np.searchsorted(self._ends, min(groups[-1] + shuffle, self._ends[-1]))
                groups.append(int(self._ends[first]))
            self._groups = np.asarray(groups[1:])
        self._shuffled: tuple[int, np.ndarray] = -1, np.empty(0, np.int64)

    def group_of(self, place: int) -> tuple[int, int]:
        """The first place of the group of a place, and the one after its last."""
        group = int(np.searchsorted(self._groups, place, side="right"))
        return int(self._groups[group - 1]) if group else 0, int(self._groups[group])

    def locate(self, place: int) -> tuple[int, int]:
        if self._shuffle:
            begin, end = self.group_of(place)
            if self._shuffled[0] != begin:
                self._shuffled = begin, _permutation(mix_seed(self._seed, self.epoch, begin, 1), end - begin)
            place = begin + int(self._shuffled[1][place - begin])
        shard = int(np.searchsorted(self._ends, place, side="right"))
        row = place - (int(self._ends[shard - 1]) if shard else 0)
        return int(self._shards[shard]), row


def _permutation(seed: int, size: int) -> np.ndarray:
    """0 ... size - 1 in the order of the SplitMix64 sequence that begins with `seed`."""
    state = np.uint64(seed) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable")
