"""WebDatasetStream: batches of image-caption pairs of the user, read from WebDataset shards.

A shard is a tar file in which the files of one sample share their name: 0001.jpg, 0001.txt. The library
`webdataset` (extra "train") opens and shuffles shards; it is imported when a stream is built, not before.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dalle2_fast.data.image_formats import open_image
from dalle2_fast.data.images import canonical
from dalle2_fast.data.samples import CAPTION_KEYS, IMAGE_KEYS, caption_of, group
from dalle2_fast.data.tar import read_tar
from dalle2_fast.data.text.tokenizer import Tokenizer, WordTokenizer, split_words
from dalle2_fast.seeds import mix_seed

SPLITS = (None, "train", "held_out")
HELD_OUT = 25  # one sample in so many is held out


class SkippedSample(UserWarning):
    """A sample, or a part of a shard, that a WebDatasetStream could not use."""


class Pair(NamedTuple):
    """An image file and its caption."""

    image: bytes
    caption: str
    shard: str
    key: str  # the name that the files of the sample share


class WebDatasetStream:
    """Endless batches from shards, a function of (shards, seed, step): a resumed run sees the same batches.

    Samples without image or caption are left out. An image that cannot be decoded is replaced by another one
    of its batch, with that one's caption; if no image of a batch can be decoded, all are replaced by others
    of the shards. Damage within a shard costs only the samples that it hits.
    `skipped` counts all of it by reason, `summary()` says it in one line, and a warning of the class
    SkippedSample names shard and sample at the 1st, 2nd, 4th, 8th ... of each reason.

    Args:
        shards: a path or URL, with braces (data-{000..099}.tar) or wildcards, a folder of .tar files, or a
            list of these.
        batch_size: samples per batch, at least 1.
        resolutions: every image is cropped to its central square and reduced by area to each of these sides,
            in pixels.
        seed: of the order of shards and samples.
        device: of the batches.
        tokenizer: for the captions, and it decides which of them are empty; words that it does not know
            become <unk>, captions that are too long are cut. None builds a WordTokenizer from the first
            50,000 captions.
        vocab_size: the largest vocabulary of the tokenizer that is built.
        shuffle: samples in the shuffle buffer; the shards are also shuffled, anew for every pass. 0 keeps
            the order of both.
        workers: threads that decode images.
        split: "held_out" reads one sample in 25, chosen by a hash of the names of shard and sample; "train"
            reads the others. None reads all.

    Raises:
        ImportError: `webdataset` is not installed.
        FileNotFoundError: a local shard does not exist.
        ValueError: the batch size is no int >= 1, the split is not one of these, or no shard holds a sample
            with image and caption.

    Example:
        >>> import io, tarfile, tempfile
        >>> shard, image = Path(tempfile.mkdtemp(), "0.tar"), io.BytesIO()
        >>> Image.new("RGB", (32, 24), "red").save(image, "PNG")
        >>> with tarfile.open(shard, "w") as tar:
        ...     for name, data in (("0.png", image.getvalue()), ("0.txt", b"a red image")):
        ...         member = tarfile.TarInfo(name)
        ...         member.size = len(data)
        ...         tar.addfile(member, io.BytesIO(data))
        >>> stream = WebDatasetStream(shard, batch_size=1, resolutions=(16,))
        >>> batch = stream.batch(0)
        >>> batch["images"][16].shape, stream.tokenizer.decode(batch["tokens"][0])
        (torch.Size([1, 3, 16, 16]), 'a red image')
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        batch_size: int = 64,
        resolutions: Sequence[int] = (64,),
        seed: int = 0,
        device: torch.device | str = "cpu",
        *,
        tokenizer: Tokenizer | None = None,
        vocab_size: int = 8192,
        shuffle: int = 1000,
        workers: int = 4,
        split: str | None = None,
    ) -> None:
        self._library = _import_webdataset()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}")
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(map(repr, SPLITS))}, got {split!r}")
        self.shards, self.batch_size, self.split = expand_shards(shards), batch_size, split
        self.resolutions, self.seed = tuple(resolutions), seed
        self.device, self.shuffle = torch.device(device), shuffle
        self.skipped: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode")
        self._pairs, self._step = None, 0
        self.tokenizer = tokenizer or self._build_tokenizer(vocab_size)

    def batch(self, step: int) -> dict:
        """The batch of a step.

        Args:
            step: from 0. Steps in order are cheap. A jump forwards reads, but does not decode, the samples
                between; a jump backwards reads from the start.

        Returns:
            images: {resolution: float32 [B, 3, R, R] in [0, 1]}, rounded to 8 bits.
            tokens: int64 [B, L].
            captions: B strings.

        Raises:
            ValueError: the step is no int >= 0, or no image of the shards can be decoded.
        """
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step: expected an int >= 0, got {step!r}")
        if self._pairs is None or step < self._step:
            self._pairs, self._step = self._endless(), 0
            self.skipped.clear()
        skip = (step - self._step) * self.batch_size
        pairs = list(itertools.islice(self._pairs, skip, skip + self.batch_size))
        self._step = step + 1

        decoded = self._decode_all(pairs)
        good = [index for index, images in enumerate(decoded) if images is not None]
        if not good:
            # Another pass in an order of this step's own, so that a resumed stream finds the same images.
            skipped = self.skipped.copy()
            order = self._one_pass(2**40 + step, self.tokenizer.has_text, shuffle=True)
            found = list(self._decodable(order, self.batch_size))
            self.skipped = skipped  # this pass has met the same samples once more
            if not found:
                raise ValueError("shards: no image can be decoded")
            pairs, decoded = map(list, zip(*found, strict=True))
            good = list(range(len(pairs)))
        # The next sample of the shard is no replacement: a resumed stream would have to decode all that it
        # skips, in order to know which samples a batch holds.
        usable = set(good)
        rows = [index if index in usable else good[index % len(good)] for index in range(self.batch_size)]
        return self._collate([pairs[index] for index in rows], [decoded[index] for index in rows])

    def first(self, count: int) -> dict | None:
        """A batch of the first samples in the order of the shards, each of them once.

        Args:
            count: the largest number of samples, >= 1.

        Returns:
            A batch as of `batch` with at most `count` samples. None if there is no sample.
        """
        order = self._one_pass(0, self.tokenizer.has_text, shuffle=False)
        found = list(self._decodable(order, count))
        self.skipped.clear()  # the same samples are counted again when batches are read
        return self._collate(*map(list, zip(*found, strict=True))) if found else None

    def _decodable(self, order: Iterator[Pair], count: int) -> Iterator[tuple[Pair, list[Tensor]]]:
        """The first `count` pairs whose images can be decoded."""
        left = count
        while left and (pairs := list(itertools.islice(order, left))):
            for pair, images in zip(pairs, self._decode_all(pairs), strict=True):
                if images is not None:
                    left -= 1
                    yield pair, images

    def _decode_all(self, pairs: list[Pair]) -> list[list[Tensor] | None]:
        """The images of each pair at all resolutions; None, counted, if they cannot be decoded."""
        decoded = list(self._threads.map(self._decode, (pair.image for pair in pairs)))
        for pair, images in zip(pairs, decoded, strict=True):
            if isinstance(images, Exception):
                self._skip(pair.shard, "image cannot be decoded", f"sample {pair.key}: {_reason(images)}")
        return [None if isinstance(images, Exception) else images for images in decoded]

    def _collate(self, pairs: list[Pair], decoded: list[list[Tensor]]) -> dict:
        captions = [pair.caption for pair in pairs]
        images = {
            resolution: torch.stack([each[column] for each in decoded]).to(self.device)
            for column, resolution in enumerate(self.resolutions)
        }
        return dict(
            images={resolution: values.float() / 255 for resolution, values in images.items()},
            tokens=self.tokenizer.encode(captions, unknown="token", truncate=True).to(self.device),
            captions=captions,
        )

    def summary(self) -> str | None:
        """One line on what was skipped since the first step; None if nothing was.

        Example:
            "skipped 3 samples or parts of shards: 2 no caption, 1 image cannot be decoded"
        """
        if not self.skipped:
            return None
        counts = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
        return f"skipped {self.skipped.total()} samples or parts of shards: {counts}"

    def _decode(self, data: bytes) -> list[Tensor] | Exception:
        try:
            with open_image(io.BytesIO(data)) as image:
                return [to_square(image, resolution) for resolution in self.resolutions]
        except Exception as error:  # PIL raises almost any exception on damaged files
            return error

    def _endless(self) -> Iterator[Pair]:
        """The pairs of all passes; the order depends on (seed, pass) only."""
        for epoch in itertools.count():
            some = False
            for pair in self._one_pass(epoch, self.tokenizer.has_text, shuffle=True):
                some = True
                yield pair
            if not some:
                raise self._no_pair()

    def _no_pair(self) -> ValueError:
        return ValueError(
            f"shards: no sample with an image ({', '.join(IMAGE_KEYS)}) and a caption "
            f"({', '.join(CAPTION_KEYS)}) in {len(self.shards)} shards"
            f"{'' if self.split is None else f' in the split {self.split!r}'}; "
            f"{self.summary() or 'nothing was skipped'}"
        )

    def _one_pass(self, epoch: int, has_text: Callable[[str], object], shuffle: bool) -> Iterator[Pair]:
        library, shards = self._library, list(self.shards)
        generator = random.Random(mix_seed(self.seed, epoch))
        stages = [self._read]
        if shuffle and self.shuffle:
            generator.shuffle(shards)
            stages.append(library.shuffle(self.shuffle, initial=self.shuffle, rng=generator))
        for sample in library.DataPipeline(library.SimpleShardList(shards), *stages):
            shard, key = sample["__url__"], sample["__key__"]
            if self.split is not None and is_held_out(shard, key) != (self.split == "held_out"):
                continue
            image = next((sample[ending] for ending in IMAGE_KEYS if ending in sample), None)
            caption = caption_of(sample)
            if image is None:
                self._skip(shard, "no image", f"sample {key}")
            elif caption is None:
                self._skip(shard, "caption is no text", f"sample {key}")
            elif not has_text(caption):
                self._skip(shard, "no caption", f"sample {key}")
            else:
                yield Pair(image, caption, shard, key)

    def _read(self, shards: Iterable[dict]) -> Iterator[dict]:
        """The samples of the shards, each a dict as `group` makes them, with the shard as "__url__"."""
        for shard in (entry["url"] for entry in shards):
            try:
                with self._library.gopen(shard, "rb") as stream:
                    report = partial(self._skip, shard)
                    for sample in group(read_tar(stream, report)):
                        yield sample | {"__url__": shard}
            except Exception as error:  # of the network, of a command, of a compression
                self._skip(shard, "shard cannot be read", _reason(error))

    def _build_tokenizer(self, size: int, samples: int = 50_000) -> WordTokenizer:
        pairs = itertools.islice(self._one_pass(0, split_words, shuffle=False), samples)
        if not (captions := [pair.caption for pair in pairs]):
            raise self._no_pair()
        self.skipped.clear()  # the same samples are counted again when batches are read
        return WordTokenizer.from_captions(captions, size)

    def _skip(self, shard: str, reason: str, where: str) -> None:
        """Count what is skipped, and warn at the 1st, 2nd, 4th, 8th ... of each reason."""
        self.skipped[reason] += 1
        count = self.skipped[reason]
        if count & (count - 1) == 0:
            warnings.warn(f"shards: {reason}: {shard}, {where} ({count} so far)", SkippedSample, stacklevel=2)


def is_held_out(shard: str, key: str) -> bool:
    """Whether a sample is in the split "held_out". It depends on the file name of its shard and on its key,
    not on the folder, so that data may be moved."""
    name = f"{PurePosixPath(shard).name}/{key}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") % HELD_OUT == 0


def _reason(error: Exception) -> str:
    """An error as a phrase, without the addresses of objects."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow can read"
    return re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error)) or type(error).__name__


def _import_webdataset():
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(
            "WebDatasetStream needs the library webdataset, which is not installed: "
            "pip install 'dalle2-fast[train]'"
        ) from error
    return webdataset


def expand_shards(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """The paths and URLs of all shards, in order.

    Args:
        shards: as of WebDatasetStream.

    Raises:
        ImportError: `webdataset` is not installed.
        FileNotFoundError: a local shard does not exist, or a folder has no .tar file.
        ValueError: `shards` is an empty list.

    Example:
        >>> expand_shards("https://host/data-{1..2}.tar")
        ['https://host/data-1.tar', 'https://host/data-2.tar']
    """
    _import_webdataset()
    from braceexpand import braceexpand  # a dependency of webdataset

    found = []
    for pattern in [shards] if isinstance(shards, str | Path) else shards:
        for name in braceexpand(str(pattern)):
            if "://" in name or name.startswith("pipe:"):
                found.append(name)
                continue
            names = Path(name).glob("*.tar") if Path(name).is_dir() else glob.glob(name)
            names = sorted(map(str, names))
            if not names:
                raise FileNotFoundError(f"shards: expected a .tar file or a folder of them, none at {name}")
            found += names
    if not found:
        raise ValueError("shards: expected at least one, got none")
    return found


def to_square(image: Image.Image, resolution: int) -> Tensor:
    """The central square of an image, reduced by area, or enlarged bicubically, to `resolution` pixels.

    Args:
        image: of any mode; see `canonical`.
        resolution: the side of the result, in pixels.

    Returns:
        uint8 [3, resolution, resolution].

    Example:
        >>> to_square(Image.new("RGB", (40, 30), "red"), 2)[:, 0, 0]
        tensor([255,   0,   0], dtype=torch.uint8)
    """
    image = canonical(image)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # The box does not depend on the resolution, so that images of different sizes stay aligned.
    method = Image.Resampling.BOX if side >= resolution else Image.Resampling.BICUBIC
    image = image.resize((resolution, resolution), method, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image))
    if image.mode == "F":  # in [0, 1] except for bicubic overshoot
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)
    return pixels.permute(2, 0, 1)
