"""Shards that can only be read from the beginning: URLs, the output of commands, and compressed archives.

Each process reads its part of the shards, every R-th of R processes. Consecutive samples make blocks of
`shuffle`, which are shuffled and stay in memory while they are used. Where each block begins (pass, shard,
samples before it in the shard) is appended to a file in the cache, so that a resumed run opens the shard of
its block first and reads no earlier one. Without that file it reads from the start, and finds the same.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

from PIL import UnidentifiedImageError

from dalle2_fast.data.samples import CAPTION_KEYS, IMAGE_KEYS, caption_of, group
from dalle2_fast.data.sources.base import Complaint, Pair, is_held_out
from dalle2_fast.data.sources.tars import cache_folder
from dalle2_fast.data.tar import read_tar
from dalle2_fast.seeds import mix_seed

Place = tuple[int, int, int]  # pass, shard among those of this process, samples of it that lie before


class StreamedShards:
    """Endless pairs of a process, in blocks.

    Args:
        names: of all shards: paths, URLs and commands (pipe:).
        seed: of the order.
        size: pairs in a block.
        shuffle: shuffle shards and blocks.
        split: as of PairStream.
        has_text: whether a caption is not empty.
        rank, world_size: this process among those that share the shards.
    """

    def __init__(
        self, names: list[str], seed: int, size: int, shuffle: bool, split: str | None,
        has_text: Callable[[str], object], rank: int, world_size: int,
    ) -> None:  # fmt: skip
        self._names, self._seed, self._size, self._shuffle = names, seed, size, shuffle
        self._split, self._has_text = split, has_text
        self._rank, self._world_size = rank, world_size
        self.report: Callable[[Complaint], object] = _ignore  # called with what is lost
        self._begin, self._block = 0, []  # the position of a block's first pair, and the block
        self._reader: Iterator[tuple[Pair | None, Place]] | None = None
        rule = getattr(has_text, "__qualname__", "")
        settings = [names, seed, size, shuffle, split, rank, world_size, rule]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        self._file = cache_folder() / "positions" / f"{digest}.jsonl"
        self._known: dict[int, Place] | None = None  # where blocks begin

    def pair(self, position: int, attempt: int = 0) -> Pair:
        """The pair at a position of this process's sequence; a later attempt is the next one in its block."""
        if not self._begin <= position < self._begin + len(self._block):
            self._seek(position)
        return self._block[(position - self._begin + attempt) % len(self._block)]

    @property
    def attempts(self) -> int:
        """How many different pairs `pair` gives for a position."""
        return max(1, len(self._block))

    def _seek(self, position: int) -> None:
        """Make the block that has a position the current one."""
        if self._reader is None or position < self._begin:
            self._known = self._read_known() if self._known is None else self._known
            begin = max(each for each in self._known if each <= position)
            self._reader, self._begin, self._block = self._endless(*self._known[begin]), begin, []
        while position >= self._begin + len(self._block):
            self._begin += len(self._block)
            self._block = self._next_block()
        if self._shuffle:
            random.Random(mix_seed(self._seed, self._begin, self._rank, 2)).shuffle(self._block)

    def _next_block(self) -> list[Pair]:
        """The next `size` pairs, or fewer at the end of a pass, so that few pairs are read only once."""
        block: list[Pair] = []
        place = (0, 0, 0)
        while len(block) < self._size:
            pair, place = next(self._reader)
            if pair is not None:
                block.append(pair)
            elif block:
                break
        self._remember(self._begin + len(block), place)
        return block

    def _endless(self, epoch: int, begin: int, offset: int) -> Iterator[tuple[Pair | None, Place]]:
        """The pairs from a place on, each with the place after it; None at the end of a pass."""
        while True:
            order, is_empty = list(self._names), (begin, offset) == (0, 0)
            if self._shuffle:
                random.Random(mix_seed(self._seed, epoch)).shuffle(order)
            mine = order[self._rank :: self._world_size]
            for shard in range(begin, len(mine)):
                for number, pair in enumerate(self.pairs(mine[shard])):
                    if number >= offset and pair is not None:
                        is_empty = False
                        yield pair, (epoch, shard, number + 1)
                offset = 0
            if is_empty:
                raise ValueError(no_pair(f"{len(mine)} shards", self._split))
            epoch, begin = epoch + 1, 0
            yield None, (epoch, 0, 0)

    def pairs(self, shard: str) -> Iterator[Pair | None]:
        """The samples of a shard in order; None for one that is not of the split or cannot be used."""
        for sample in read_shard(shard, lambda complaint: self.report(complaint)):  # which may change
            key = sample["__key__"]
            if self._split is not None and is_held_out(shard, key) != (self._split == "held_out"):
                yield None
                continue
            image, caption = image_of(sample), caption_of(sample)
            reason = None
            if image is None:
                reason = "no image"
            elif caption is None:
                reason = "caption is no text"
            elif not self._has_text(caption):
                reason = "no caption"
            if reason is not None:
                self.report(Complaint(reason, shard, f"sample {key}"))
            yield None if reason is not None else Pair(image, caption, shard, key)

    def _read_known(self) -> dict[int, Place]:
        known: dict[int, Place] = {0: (0, 0, 0)}
        with suppress(OSError):
            for line in self._file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError):  # a line that was cut by a kill
                    begin, *place = map(int, json.loads(line))
                    if len(place) == 3 and min(begin, *place) >= 0:
                        known[begin] = tuple(place)
        return known

    def _remember(self, begin: int, place: Place) -> None:
        if self._known is None or begin in self._known:
            return
        self._known[begin] = place
        with suppress(OSError):  # it only saves time
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps([begin, *place])}")


def _ignore(complaint: Complaint) -> None:
    pass


def read_shard(shard: str, report: Callable[[Complaint], object]) -> Iterator[dict]:
    """The samples of a path, URL or command, as `samples.group` makes them. Errors are only reported."""

    def complain(reason: str, where: str) -> None:
        report(Complaint(reason, shard, where))

    try:
        with closing(open_shard(shard)) as stream:
            yield from group(read_tar(stream, complain))
    except Exception as error:  # of the network, of a command, of a compression
        complain("shard cannot be read", phrase(error))


def open_shard(shard: str):
    """A shard as a binary stream."""
    if "://" not in shard and not shard.startswith("pipe:"):
        return open(shard, "rb")
    if not shard.startswith("pipe:"):  # some versions of webdataset give URLs to a shell, within quotes
        shard = urllib.parse.quote(shard, safe=":/?#[]@!$&()*+,;=%~")
    return import_webdataset().gopen(shard, "rb")


def image_of(sample: dict) -> bytes | None:
    """The image of a sample."""
    return next((sample[ending] for ending in IMAGE_KEYS if ending in sample), None)


def phrase(error: Exception) -> str:
    """An error as a phrase, without the addresses of objects."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow can read"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", text) or type(error).__name__


def no_pair(where: str, split: str | None) -> str:
    """The message about data without a single pair."""
    return (
        f"data: no sample with an image ({', '.join(IMAGE_KEYS)}) and a caption "
        f"({', '.join(CAPTION_KEYS)}) in {where}"
        f"{'' if split is None else f' in the split {split!r}'}"
    )


def import_webdataset():
    """The library webdataset, which opens URLs and commands."""
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(
            "shards that are no local files need the library webdataset, which is not installed: "
            "pip install 'dalle2-fast[train]'"
        ) from error
    return webdataset
