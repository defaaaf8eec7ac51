"""What every kind of data is for the streams: shards of numbered samples that are read in any order."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np

SPLITS = (None, "train", "held_out")
HELD_OUT = 25  # one sample in so many is held out
ROWS = 1024  # samples that a folder or a list calls a shard
REMEMBERED = 2**20  # samples whose keys and places stay in memory


class Pair(NamedTuple):
    """An image file and its caption.

    Args:
        image: the content of the file; None if only the caption was asked for.
        caption: as text; "" if there is none, None if it is something else than text.
        shard: where it comes from, as messages call it.
        key: the name of the sample.
        embed: the embedding of the image [E], from a source that has them.
    """

    image: bytes | None
    caption: str | None
    shard: str
    key: str
    embed: np.ndarray | None = None


class Complaint(NamedTuple):
    """What was lost, and where."""

    reason: str
    shard: str
    where: str


class SampleError(Exception):
    """A sample cannot be used, for the reason that `complaint` has."""

    def __init__(self, reason: str, shard: str, where: str) -> None:
        super().__init__(reason, shard, where)
        self.complaint = Complaint(reason, shard, where)


class PairSource(Protocol):
    """Pairs in shards: files of shards, or runs of ROWS samples of what has no shards.

    Args:
        kind: what it is, in words.
        counts: the number of samples of each shard.
        names: of the shards, for messages; as many as `counts`.
        complaints: what was lost when the samples were listed.
        near: the largest number of samples that may be shuffled together, because a part of the file is read
            for each of them; None is any.
    """

    kind: str
    counts: list[int]
    names: list[str]
    complaints: list[Complaint]
    near: int | None

    def held_out(self, shard: int) -> np.ndarray:
        """bool [counts[shard]]: which samples are in the split "held_out"."""
        ...

    def count_held_out(self, shard: int) -> int:
        """How many they are."""
        ...

    def read(self, shard: int, row: int, *, image: bool = True) -> Pair:
        """A sample. OSError or SampleError if it cannot be read."""
        ...


class PackedStrings:
    """Strings in one piece of memory, because a million Python strings take 60 MB more.

    Example:
        >>> PackedStrings.of(["a", "bc"])[1]
        'bc'
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> PackedStrings:
        encoded = [text.encode(errors="surrogateescape") for text in strings]
        ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        begin = self.ends[index - 1] if index else 0
        return self.data[begin : self.ends[index]].tobytes().decode(errors="surrogateescape")


class Remembered:
    """The results of the latest calls of a function of one integer, as many as have REMEMBERED samples.

    Args:
        function: int -> something with a length.
        limit: of the sum of the lengths; the latest result is kept regardless of it.
    """

    def __init__(self, function: Callable[[int], object], limit: int = REMEMBERED) -> None:
        self._function, self._limit = function, limit
        self._results: OrderedDict[int, object] = OrderedDict()
        self._size = 0

    def __call__(self, number: int):
        if number in self._results:
            self._results.move_to_end(number)
            return self._results[number]
        result = self._results[number] = self._function(number)
        self._size += len(result)
        while self._size > self._limit and len(self._results) > 1:
            self._size -= len(self._results.popitem(last=False)[1])
        return result


def is_held_out(shard: str, key: str) -> bool:
    """Whether a sample is in the split "held_out". It depends on the file name of its shard ("" for what has
    no shards) and on its key, not on the folder, so that data may be moved."""
    return bool(held_out_mask(shard, [key])[0])


def held_out_mask(shard: str, keys: Iterable[str]) -> np.ndarray:
    """bool [N]: `is_held_out` of each key."""
    name = PurePosixPath(shard).name
    hashes = (
        hashlib.sha256(f"{name}/{key}".encode(errors="surrogateescape")).digest()[:8] for key in keys
    )
    return np.fromiter((int.from_bytes(each, "big") % HELD_OUT == 0 for each in hashes), dtype=bool)
