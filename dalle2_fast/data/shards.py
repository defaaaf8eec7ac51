"""WebDatasetStream: batches of image-caption pairs of the user, read from WebDataset shards.

A shard is a tar file in which the files of one sample share their name: 0001.jpg, 0001.txt. The library
`webdataset` (extra "train") reads shards; it is imported when a stream is built, not before.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle2_fast.data.images import canonical
from dalle2_fast.data.text.tokenizer import Tokenizer, WordTokenizer, split_words
from dalle2_fast.seeds import mix_seed

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("txt", "caption", "json")  # in a JSON file, the caption is "caption" or "text"


class WebDatasetStream:
    """Endless batches from shards, a function of (shards, seed, step): a resumed run sees the same batches.

    Samples without image or caption are left out. An image that cannot be decoded is replaced by another one
    of its batch, with that one's caption. `skipped` counts both by reason, and a warning reports them.

    Args:
        shards: a path or URL, with braces (data-{000..099}.tar) or wildcards, a folder of .tar files, or a
            list of these.
        batch_size: samples per batch, at least 1.
        resolutions: every image is cropped to its central square and reduced by area to each of these sides,
            in pixels.
        seed: of the order of shards and samples.
        device: of the batches.
        tokenizer: for the captions; words that it does not know become <unk>, captions that are too long are
            cut. None builds a WordTokenizer from the first 50,000 captions.
        vocab_size: the largest vocabulary of the tokenizer that is built.
        shuffle: samples in the shuffle buffer; the shards are also shuffled, anew for every pass. 0 keeps
            the order of both.
        workers: threads that decode images.

    Raises:
        ImportError: `webdataset` is not installed.
        FileNotFoundError: a local shard does not exist.
        ValueError: the batch size is no int >= 1, or no shard holds a sample with image and caption.
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
    ) -> None:
        self._library = _import_webdataset()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}")
        self.shards, self.batch_size = expand_shards(shards), batch_size
        self.resolutions, self.seed = tuple(resolutions), seed
        self.device, self.shuffle = torch.device(device), shuffle
        self.skipped: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode")
        self._samples, self._step = None, 0
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
            ValueError: the step is no int >= 0, or no image of the batch can be decoded.
        """
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step: expected an int >= 0, got {step!r}")
        if self._samples is None or step < self._step:
            self._samples, self._step = self._endless(), 0
            self.skipped.clear()
        skip = (step - self._step) * self.batch_size
        samples = list(itertools.islice(self._samples, skip, skip + self.batch_size))
        self._step = step + 1

        decoded = list(self._threads.map(self._decode, (image for image, _ in samples)))
        good = [index for index, image in enumerate(decoded) if not isinstance(image, Exception)]
        for image in decoded:
            if isinstance(image, Exception):
                self._skip("image cannot be decoded", image)
        if not good:
            raise ValueError(f"shards: none of the {self.batch_size} images of step {step} can be decoded")
        # The next sample of the shard is no replacement: a resumed stream would have to decode all that it
        # skips, in order to know which samples a batch holds.
        order = [index if index in set(good) else good[index % len(good)] for index in range(len(decoded))]
        captions = [samples[index][1] for index in order]
        images = {
            resolution: torch.stack([decoded[index][column] for index in order]).to(self.device)
            for column, resolution in enumerate(self.resolutions)
        }
        return dict(
            images={resolution: values.float() / 255 for resolution, values in images.items()},
            tokens=self.tokenizer.encode(captions, unknown="token", truncate=True).to(self.device),
            captions=captions,
        )

    def _decode(self, data: bytes) -> list[Tensor] | Exception:
        try:
            with Image.open(io.BytesIO(data)) as image:
                return [to_square(image, resolution) for resolution in self.resolutions]
        except Exception as error:  # PIL raises almost any exception on damaged files
            return error

    def _endless(self) -> Iterator[tuple[bytes, str]]:
        """(image file, caption) of all passes; the order depends on (seed, pass) only."""
        for epoch in itertools.count():
            some = False
            for sample in self._one_pass(epoch):
                some = True
                yield sample
            if not some:
                raise ValueError(
                    f"shards: no sample with an image ({', '.join(IMAGE_KEYS)}) and a caption "
                    f"({', '.join(CAPTION_KEYS)}) in {len(self.shards)} shards; skipped: {dict(self.skipped)}"
                )

    def _one_pass(self, epoch: int, shuffle: bool = True) -> Iterator[tuple[bytes, str]]:
        library, shards = self._library, list(self.shards)
        generator = random.Random(mix_seed(self.seed, epoch))

        def unreadable(error: Exception) -> bool:
            return self._skip("shard cannot be read", error)

        stages = [library.tarfile_to_samples(handler=unreadable)]
        if shuffle and self.shuffle:
            generator.shuffle(shards)
            stages.append(library.shuffle(self.shuffle, initial=self.shuffle, rng=generator))
        for sample in library.DataPipeline(library.SimpleShardList(shards), *stages):
            image = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
            caption = _caption(sample)
            if image is None:
                self._skip("no image", sample["__key__"])
            elif not split_words(caption):
                self._skip("no caption", sample["__key__"])
            else:
                yield image, caption

    def _build_tokenizer(self, size: int, samples: int = 50_000) -> WordTokenizer:
        captions = [caption for _, caption in itertools.islice(self._one_pass(0, shuffle=False), samples)]
        self.skipped.clear()  # the same samples are counted again when batches are read
        if not captions:
            next(self._endless())  # raises, with the reason
        return WordTokenizer.from_captions(captions, size)

    def _skip(self, reason: str, what: object) -> bool:
        """Count a bad sample, and warn at the 1st, 2nd, 4th, 8th ... of each reason.

        Always True, which tells webdataset to go on.
        """
        self.skipped[reason] += 1
        count = self.skipped[reason]
        if count & (count - 1) == 0:
            warnings.warn(f"shards: {reason} ({count} so far): {what}", stacklevel=2)
        return True


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
        FileNotFoundError: a local shard does not exist, or a folder has no .tar file.
        ValueError: `shards` is an empty list.

    Example:
        >>> expand_shards("https://host/data-{1..2}.tar")
        ['https://host/data-1.tar', 'https://host/data-2.tar']
    """
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


def _caption(sample: dict) -> str:
    """The caption of a sample as read from the tar file, "" if there is none."""
    for key in CAPTION_KEYS:
        if key not in sample:
            continue
        text = sample[key].decode("utf-8", errors="replace")
        if key == "json":
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                return ""
            text = (record.get("caption") or record.get("text") or "") if isinstance(record, dict) else ""
        return str(text).strip()
    return ""
