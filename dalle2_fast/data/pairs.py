"""Positions in a sequence of pairs -> rows of a batch: read, replaced if it cannot be used, decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dalle2_fast.data.image_formats import open_image
from dalle2_fast.data.images import to_square
from dalle2_fast.data.order import NEAR, Order
from dalle2_fast.data.sources.base import Complaint, Pair, PairSource, Remembered, SampleError
from dalle2_fast.data.sources.streamed import StreamedShards, phrase
from dalle2_fast.data.text.tokenizer import Tokenizer

ATTEMPTS = 1000  # samples that are tried in the place of one that cannot be used


@dataclass
class Rows:
    """Rows of a batch, on the CPU.

    Args:
        images: of each resolution, uint8 [rows, 3, R, R].
        tokens: int64 [rows, L].
        captions: of the rows.
        complaints: about what was skipped for them.
        embeds: of the images [rows, E], if the source has them.
    """

    images: list[Tensor]
    tokens: Tensor
    captions: list[str]
    complaints: list[Complaint] = field(default_factory=list)
    embeds: Tensor | None = None

    def pin_memory(self) -> Rows:
        """The same rows in page-locked memory, from which a GPU copies while other work goes on."""
        images = [image.pin_memory() for image in self.images]
        embeds = None if self.embeds is None else self.embeds.pin_memory()
        return Rows(images, self.tokens.pin_memory(), self.captions, self.complaints, embeds)


class IndexedPairs:
    """The endless, shuffled sequence of a source that is read in any order.

    Args:
        source: of the pairs.
        seed, shuffle: of the order, see Order.
        split: as of PairStream.
    """

    attempts = ATTEMPTS + NEAR

    def __init__(self, source: PairSource, seed: int, shuffle: int, split: str | None) -> None:
        self._source, self._split = source, split
        self._rows = Remembered(self._rows_of)
        counts = source.counts
        if split is not None:
            held_out = [source.count_held_out(shard) for shard in range(len(counts))]
            trained = [count - held for count, held in zip(counts, held_out, strict=True)]
            counts = held_out if split == "held_out" else trained
        self._counts = counts
        if source.near is not None:
            shuffle = min(shuffle, source.near)
        self._order = Order(counts, seed, shuffle)

    @property
    def total(self) -> int:
        """The samples of a pass."""
        return self._order.total

    def pair(self, position: int, attempt: int = 0) -> Pair:
        """The pair at a position, or the one that takes its place. OSError or SampleError if unreadable."""
        return self.at(*self._order.locate(position, attempt))

    def at(self, shard: int, row: int, *, image: bool = True) -> Pair:
        """The pair of a row, counted within the split."""
        row = row if self._split is None else int(self._rows(shard)[row])
        try:
            return self._source.read(shard, row, image=image)
        except OSError as error:
            where = f"sample {row}: {phrase(error)}"
            raise SampleError("sample cannot be read", self._source.names[shard], where) from error

    def in_order(self, report: Callable[[Complaint], object], *, image: bool = True) -> Iterator[Pair]:
        """All pairs once, in the order of the shards; unreadable ones are reported."""
        for shard in range(len(self._source.names)):
            for row in range(self._counts[shard]):
                try:
                    yield self.at(shard, row, image=image)
                except SampleError as error:
                    report(error.complaint)

    def _rows_of(self, shard: int) -> np.ndarray:
        """The rows of a shard that are in the split."""
        return np.flatnonzero(self._source.held_out(shard) == (self._split == "held_out"))


class RowMaker:
    """Makes rows of batches, in this process or in another one.

    Args:
        pairs: the sequence.
        tokenizer: of the captions; it decides which of them are empty.
        resolutions: of the images, in pixels.
        threads: that decode images.
    """

    def __init__(
        self, pairs: IndexedPairs | StreamedShards, tokenizer: Tokenizer, resolutions: Sequence[int],
        threads: int = 1,
    ) -> None:  # fmt: skip
        self.pairs, self.tokenizer, self.resolutions = pairs, tokenizer, tuple(resolutions)
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pool": None}

    def rows(self, begin: int, end: int) -> Rows:
        """The rows at positions begin ... end - 1. ValueError if no sample can be used in a row's place."""
        complaints: list[Complaint] = []
        if isinstance(self.pairs, StreamedShards):
            self.pairs.report = complaints.append
        pairs, images = [], []
        found = [self._usable(position, 0, complaints) for position in range(begin, end)]
        decoded = self._map(self.decode, (pair.image for _, pair in found))
        for position, (attempt, pair), image in zip(range(begin, end), found, decoded, strict=True):
            while isinstance(image, Exception):
                where = f"sample {pair.key}: {phrase(image)}"
                complaints.append(Complaint("image cannot be decoded", pair.shard, where))
                attempt, pair = self._usable(position, attempt + 1, complaints)
                image = self.decode(pair.image)
            pairs.append(pair)
            images.append(image)
        return self.collate(pairs, images, complaints)

    def _usable(self, position: int, attempt: int, complaints: list[Complaint]) -> tuple[int, Pair]:
        """The first pair from `attempt` on that has a caption, and its attempt."""
        while True:
            if attempt and attempt >= self.pairs.attempts:
                last = f"; the last: {complaints[-1].reason}, {complaints[-1].where}" if complaints else ""
                raise ValueError(
                    f"data: no image can be decoded, or none has a caption, in {attempt} samples{last}"
                )
            try:
                pair = self.pairs.pair(position, attempt)
                if pair.caption is None:
                    raise SampleError("caption is no text", pair.shard, f"sample {pair.key}")
                if not self.tokenizer.has_text(pair.caption):
                    raise SampleError("no caption", pair.shard, f"sample {pair.key}")
                return attempt, pair
            except SampleError as error:
                complaints.append(error.complaint)
                attempt += 1

    def decode(self, data: bytes) -> list[Tensor] | Exception:
        """The square image at each resolution, uint8 [3, R, R]; what Pillow raised if it cannot decode it."""
        if not self.resolutions:  # only the caption, and the embedding, are wanted
            return []
        try:
            with open_image(io.BytesIO(data)) as image:
                return [to_square(image, resolution) for resolution in self.resolutions]
        except Exception as error:  # PIL raises almost any exception on damaged files
            return error

    def collate(self, pairs: list[Pair], images: list[list[Tensor]], complaints: list[Complaint]) -> Rows:
        """Pairs and their decoded images as rows of a batch."""
        captions = [pair.caption for pair in pairs]
        stacked = [torch.stack([each[column] for each in images]) for column in range(len(self.resolutions))]
        tokens = self.tokenizer.encode(captions, unknown="token", truncate=True)
        embeds = None
        if pairs[0].embed is not None:
            embeds = torch.from_numpy(np.stack([pair.embed for pair in pairs]))
        return Rows(stacked, tokens, captions, complaints, embeds)

    def _map(self, function: Callable, items: Iterable) -> list:
        if self.threads <= 1:
            return [function(item) for item in items]
        if self._pool is None or self._pid != os.getpid():  # threads do not survive a fork
            self._pool, self._pid = ThreadPoolExecutor(self.threads, thread_name_prefix="decode"), os.getpid()
        return list(self._pool.map(function, items))
