"""PairStream: batches of the user's image-caption pairs, from shards, folders and lists."""

from __future__ import annotations

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from dalle2_fast.data.pairs import IndexedPairs, RowMaker, Rows
from dalle2_fast.data.prefetch import Prefetcher, Span, parts
from dalle2_fast.data.sources import StreamedNames, open_source
from dalle2_fast.data.sources.base import SPLITS, Complaint, Pair, PairSource
from dalle2_fast.data.sources.streamed import StreamedShards, no_pair
from dalle2_fast.data.text.tokenizer import Tokenizer, WordTokenizer, split_words

SHUFFLED = 100_000  # samples that are shuffled together, where reading is possible at any place
SHUFFLED_IN_MEMORY = 1000  # where it is not
VOCABULARY_CAPTIONS = 50_000
MET = 2**20  # complaints that are remembered, in order to count each once


class Embeddings(Protocol):
    """What a stream needs to know of precomputed embeddings."""

    def attached_to(self, source: PairSource | StreamedNames, *, images: bool) -> PairSource:
        """The source whose pairs have embeddings; images: whether their images are wanted, too."""
        ...


class SkippedSample(UserWarning):
    """A sample, or a part of a shard, that a PairStream could not use."""


class PairStream:
    """Endless batches of image-caption pairs, a function of (data, seed, step): a resumed run sees the same.

    Each pass has every sample once. Data that can be read at any place (local uncompressed tar shards,
    folders, lists, datasets) are listed once; row k of step s is then a function of (seed, s, k) for any
    number of processes, and any step is reached without reading those before it. URLs, commands and
    compressed shards are streamed: each process has its own shards, their order depends on the number of
    processes, and a resumed run begins with the shard at which it was, see `data/sources/streamed.py`.

    Samples without image or caption are left out. One that cannot be used (its image cannot be decoded, its
    caption is empty) is replaced by another sample. Damage within a shard costs only the samples that it
    hits. `skipped` counts all of it by reason, each once, `summary()` says it in one line, and a warning of
    the class SkippedSample names shard and sample at the 1st, 2nd, 4th, 8th ... of each reason.

    Args:
        data: one of the kinds that docs/data.md describes: tar shards (a path or URL, with braces
            (data-{000..099}.tar) or wildcards, a folder of .tar files, or a list of these), a folder of
            pictures with captions, a CSV or Parquet list, or a folder that Hugging Face `datasets` saved.
        batch_size: samples per batch of all processes together, at least 1.
        resolutions: every image is cropped to its central square and reduced by area to each of these sides,
            in pixels.
        seed: of the order of shards and samples.
        device: of the batches.
        tokenizer: for the captions, and it decides which of them are empty; words that it does not know
            become <unk>, captions that are too long are cut. None builds a WordTokenizer from the first
            50,000 captions.
        vocab_size: the largest vocabulary of the tokenizer that is built.
        shuffle: the least number of samples that are shuffled together; the shards are also shuffled, anew
            for every pass. 0 keeps the order of both. None: 100,000, or 1,000 of streamed shards, which are
            held in memory.
        workers: background processes that read and decode in advance; 0 decodes when a batch is asked for.
            The batches are the same. Streamed shards are read by one process with so many threads.
        split: "held_out" reads one sample in 25, chosen by a hash of the names of shard and sample; "train"
            reads the others. None reads all.
        rank: this process, of those that share each batch: it gets the rows rank * batch_size / world_size
            and following.
        world_size: the number of these processes.
        allow_pipe: run the commands of shards that begin with "pipe:".
        embeddings: precomputed embeddings of the images of `data`, an `embeddings.folder.EmbeddingFolder`:
            batches then have them, and without `resolutions` no image is read.

    Raises:
        ImportError: a library that this kind of data needs is not installed.
        FileNotFoundError: there is no file at `data`.
        ValueError: an argument is out of range, `data` is none of these kinds, or it has no sample with
            image and caption.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (32, 24), "red").save(folder / "0.png")
        >>> _ = (folder / "0.txt").write_text("a red image")
        >>> stream = PairStream(folder, batch_size=1, resolutions=(16,))
        >>> batch = stream.batch(0)
        >>> batch["images"][16].shape, stream.tokenizer.decode(batch["tokens"][0])
        (torch.Size([1, 3, 16, 16]), 'a red image')
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
        batch_size: int = 64,
        resolutions: Sequence[int] = (64,),
        seed: int = 0,
        device: torch.device | str = "cpu",
        *,
        tokenizer: Tokenizer | None = None,
        vocab_size: int = 8192,
        shuffle: int | None = None,
        workers: int = 0,
        split: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        allow_pipe: bool = False,
        embeddings: Embeddings | None = None,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1), ("world_size", world_size, 1), ("workers", workers, 0),
        ):  # fmt: skip
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
        if not isinstance(rank, int) or not 0 <= rank < world_size:
            raise ValueError(f"rank: expected an int from 0 to {world_size - 1}, got {rank!r}")
        if batch_size % world_size:
            raise ValueError(
                f"batch_size: expected a multiple of the number of processes, {world_size}, got {batch_size}"
            )
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(map(repr, SPLITS))}, got {split!r}")
        self.batch_size, self.split, self.seed = batch_size, split, seed
        self.resolutions, self.device = tuple(resolutions), torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.skipped: Counter[str] = Counter()
        self._met: set[int] = set()  # what was counted
        self._step = 0
        self._source = open_source(
            data, rank=rank, world_size=world_size, allow_pipe=allow_pipe
        )
        self._shuffle = shuffle
        self.tokenizer = tokenizer or self._build_tokenizer(vocab_size)
        if embeddings is not None:  # after the tokenizer, which does not depend on them
            self._source = embeddings.attached_to(self._source, images=bool(self.resolutions))
        self._rows = batch_size // world_size
        self._row_bytes = sum(3 * resolution**2 for resolution in self.resolutions)
        self._maker: RowMaker | None = None
        self._workers, self._prefetcher = workers, None

    @property
    def is_streamed(self) -> bool:
        """Whether the data are read from the beginning to the end, see the class."""
        return isinstance(self._source, StreamedNames)

    def batch(self, step: int) -> dict:
        """This process's rows of the batch of a step.

        Args:
            step: from 0. With `workers`, steps in order are prepared in advance.

        Returns:
            images: {resolution: float32 [B, 3, R, R] in [0, 1]}, rounded to 8 bits, where B is batch_size /
                world_size.
            tokens: int64 [B, L].
            captions: B strings.
            image_embed: with `embeddings`, float32 [B, E].

        Raises:
            ValueError: the step is no int >= 0, or no image of the data can be decoded.
            OSError: a background process has ended.
        """
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step: expected an int >= 0, got {step!r}")
        if self._maker is None:
            self._prepare()
        if step < self._step:
            self.skipped.clear()
            self._met.clear()
            self._count(self._complaints_of_listing())
        self._step = step + 1
        if self._prefetcher is not None:
            rows = self._prefetcher.rows(step)
        else:
            rows = [self._maker.rows(*span) for span in self._spans(step)]
        return self._batch(rows)

    def first(self, count: int) -> dict | None:
        """A batch of the first samples in the order of the data, each of them once, for every process alike.

        Args:
            count: the largest number of samples, >= 1.

        Returns:
            A batch as of `batch` with at most `count` samples. None if there is no sample.
        """
        decode = RowMaker(None, self.tokenizer, self.resolutions).decode
        pairs, images = [], []
        for pair in self._in_order(self.tokenizer.has_text):
            image = decode(pair.image)
            if not isinstance(image, Exception):
                pairs.append(pair)
                images.append(image)
            if len(pairs) == count:
                break
        if not pairs:
            return None
        return self._batch([RowMaker(None, self.tokenizer, self.resolutions).collate(pairs, images, [])])

    def close(self) -> None:
        """End the background processes; a later `batch` starts them again."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def summary(self) -> str | None:
        """One line on what was skipped since the first step; None if nothing was.

        Example:
            "skipped 3 samples or parts of shards: 2 no caption, 1 image cannot be decoded"
        """
        if not self.skipped:
            return None
        counts = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
        return f"skipped {self.skipped.total()} samples or parts of shards: {counts}"

    def _prepare(self) -> None:
        """Open the sequence of pairs; with workers, prepare the processes."""
        self._count(self._complaints_of_listing())
        if self.is_streamed:
            size = SHUFFLED_IN_MEMORY if self._shuffle is None else max(1, self._shuffle)
            pairs = StreamedShards(
                self._source.names, self.seed, size, self._shuffle != 0, self.split,
                self.tokenizer.has_text, self.rank, self.world_size,
            )  # fmt: skip
            workers, threads = min(1, self._workers), max(1, self._workers)
        else:
            shuffle = SHUFFLED if self._shuffle is None else self._shuffle
            pairs = IndexedPairs(self._source, self.seed, shuffle, self.split)
            if not pairs.total:
                raise ValueError(self._no_pair())
            workers, threads = self._workers, 1 if self._workers else min(4, os.cpu_count() or 1)
        self._maker = RowMaker(pairs, self.tokenizer, self.resolutions, threads)
        if workers:
            is_cuda = self.device.type == "cuda"
            self._prefetcher = Prefetcher(self._maker, self._spans, workers, pin=is_cuda)

    def _spans(self, step: int) -> list[Span]:
        """The positions of this process's rows of a step, in parts."""
        if self.is_streamed:  # each process counts in a sequence of its own
            begin = step * self._rows
        else:
            begin = step * self.batch_size + self.rank * self._rows
        return parts(begin, begin + self._rows, self._row_bytes)

    def _batch(self, rows: list[Rows]) -> dict:
        for part in rows:
            self._count(part.complaints)

        def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
            on_device = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            return on_device[0] if len(on_device) == 1 else torch.cat(on_device)

        images = {
            resolution: joined([part.images[column] for part in rows]).float() / 255
            for column, resolution in enumerate(self.resolutions)
        }
        captions = list(itertools.chain.from_iterable(part.captions for part in rows))
        batch = dict(images=images, tokens=joined([part.tokens for part in rows]), captions=captions)
        if rows[0].embeds is not None:
            batch["image_embed"] = joined([part.embeds for part in rows]).float()
        return batch

    def _in_order(self, has_text, *, image: bool = True) -> Iterator[Pair]:
        """The pairs that have a caption, once, in the order of the data; nothing is counted."""
        if self.is_streamed:
            shards = StreamedShards(
                self._source.names, self.seed, 1, False, self.split, has_text, 0, 1
            )
            found = itertools.chain.from_iterable(map(shards.pairs, self._source.names))
            yield from (pair for pair in found if pair is not None)
        else:
            pairs = IndexedPairs(self._source, self.seed, 0, self.split)
            for pair in pairs.in_order(lambda complaint: None, image=image):
                if pair.caption is not None and has_text(pair.caption):
                    yield pair

    def _build_tokenizer(self, size: int) -> WordTokenizer:
        pairs = itertools.islice(self._in_order(split_words, image=False), VOCABULARY_CAPTIONS)
        if not (captions := [pair.caption for pair in pairs]):
            self._count(self._complaints_of_listing())
            raise ValueError(self._no_pair())
        return WordTokenizer.from_captions(captions, size)

    def _no_pair(self) -> str:
        names = getattr(self._source, "names", ())
        shards = f"{len(names)} {self._source.kind}" if self._source.kind.endswith("shards") else "the data"
        return f"{no_pair(shards, self.split)}; {self.summary() or 'nothing was skipped'}"

    def _complaints_of_listing(self) -> list[Complaint]:
        """What was lost when the data were listed; one process speaks for all."""
        return [] if self.is_streamed or self.rank else self._source.complaints

    def _count(self, complaints: list[Complaint]) -> None:
        for complaint in complaints:
            self._skip(complaint)

    def _skip(self, complaint: Complaint) -> None:
        """Count what is skipped, and warn at the 1st, 2nd, 4th, 8th ... of each reason."""
        reason, shard, where = complaint
        if hash(complaint) in self._met:
            return
        if len(self._met) < MET:
            self._met.add(hash(complaint))
        self.skipped[reason] += 1
        count = self.skipped[reason]
        if count & (count - 1) == 0:
            warnings.warn(f"data: {reason}: {shard}, {where} ({count} so far)", SkippedSample, stacklevel=2)
