"""Local, uncompressed tar shards: headers are read once, then every sample is read in one place of its file.

The list of a shard (offsets, sizes, keys), and the counts of all shards together, are kept in the user's
cache folder (~/.cache/dalle2_fast, or in XDG_CACHE_HOME), never next to the data. They are made anew if size
or time of a shard has changed. A list is read when a sample of its shard is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dalle2_fast.data.samples import CAPTION_KEYS, IMAGE_KEYS, caption_of, group
from dalle2_fast.data.sources.base import (
    Complaint,
    PackedStrings,
    Pair,
    Remembered,
    SampleError,
    held_out_mask,
)
from dalle2_fast.data.tar import list_tar

FORMAT = 1  # of the files in the cache; others are not read
CACHED_FROM = 500  # samples; the list of a smaller shard is made in a few milliseconds


@dataclass(frozen=True)
class TarIndex:
    """Where the samples of a shard are."""

    keys: PackedStrings
    images: np.ndarray  # int64 [N, 2]: offset and size
    captions: np.ndarray  # int64 [N, 2]
    endings: np.ndarray  # int8 [N]: of the captions, an index of CAPTION_KEYS
    held_out: np.ndarray  # bool [N]
    complaints: list[tuple[str, str]]  # (reason, where)

    def __len__(self) -> int:
        return len(self.keys)


class TarShards:
    """A `PairSource` of local tar files.

    Args:
        paths: of the shards.
        first: the shard that is listed first. Processes that begin at different ones share the work, because
            each finds the lists of the others in the cache.
    """

    kind, near = "tar shards", None

    def __init__(self, paths: Sequence[str], first: int = 0) -> None:
        self.names = list(paths)
        self._index = Remembered(self._load)
        stamps = json.dumps([_stamp(name) for name in self.names])
        cached = cache_folder() / "counts" / f"{hashlib.sha256(stamps.encode()).hexdigest()[:32]}.json"
        rows = _read_counts(cached, len(self.names))
        if rows is None:
            found = {}
            for number in range(len(self.names)):
                shard = (first + number) % len(self.names)
                index = self._index(shard)
                found[shard] = [len(index), int(index.held_out.sum()), index.complaints]
            rows = [found[shard] for shard in range(len(self.names))]
            if sum(row[0] for row in rows) >= CACHED_FROM:
                write_cached(cached, lambda file: file.write(json.dumps(rows).encode()))
        self.counts, self._held_out_counts, complaints = map(list, zip(*rows, strict=True))
        self.complaints = [
            Complaint(reason, name, where)
            for name, found in zip(self.names, complaints, strict=True) for reason, where in found
        ]  # fmt: skip

    def held_out(self, shard: int) -> np.ndarray:
        return self._index(shard).held_out

    def count_held_out(self, shard: int) -> int:
        return self._held_out_counts[shard]

    def read(self, shard: int, row: int, *, image: bool = True) -> Pair:
        index, name = self._index(shard), self.names[shard]
        if row >= len(index):
            raise SampleError("shard has changed", name, f"{len(index)} samples are left")
        with open(name, "rb", buffering=0) as file:
            text = _read(file, index.captions[row])
            data = _read(file, index.images[row]) if image else None
        if text is None or (image and data is None):
            raise SampleError("shard has changed", name, f"sample {index.keys[row]} is cut short")
        caption = caption_of({CAPTION_KEYS[index.endings[row]]: text})
        return Pair(data, caption, name, index.keys[row])

    def _load(self, shard: int) -> TarIndex:
        path = self.names[shard]
        stamp = _stamp(path)
        cached = cache_folder() / "shards" / (hashlib.sha256(stamp[1].encode()).hexdigest()[:32] + ".npz")
        index = _read_cached(cached, stamp)
        if index is None:
            index = index_of(path)
            if len(index) >= CACHED_FROM:
                write_cached(cached, lambda file: _save(file, stamp, index))
        return index


def index_of(path: str) -> TarIndex:
    """Read the headers of a shard."""
    complaints: list[tuple[str, str]] = []
    samples = []
    try:
        # A buffer of this size holds the small files between two images, with their headers.
        with open(path, "rb", buffering=8192) as file:
            for sample in group(list_tar(file, lambda *report: complaints.append(report))):
                samples.append(sample)
    except (OSError, ValueError) as error:
        complaints.append(("shard cannot be read", getattr(error, "strerror", None) or str(error)))
    return make_index(samples, path, complaints)


def make_index(samples: Sequence[dict], path: str, complaints: list[tuple[str, str]]) -> TarIndex:
    """The index of samples as `group` makes them, of the pairs (offset, size) of their files."""
    keys, images, captions, endings = [], [], [], []
    for sample in samples:
        image = next((sample[ending] for ending in IMAGE_KEYS if ending in sample), None)
        ending = next((ending for ending in CAPTION_KEYS if ending in sample), None)
        if image is None or ending is None:
            reason = "no image" if image is None else "no caption"
            complaints.append((reason, f"sample {sample['__key__']}"))
            continue
        keys.append(sample["__key__"])
        images.append(image)
        captions.append(sample[ending])
        endings.append(CAPTION_KEYS.index(ending))
    pairs = partial(np.asarray, dtype=np.int64)
    return TarIndex(
        PackedStrings.of(keys),
        pairs(images).reshape(-1, 2),
        pairs(captions).reshape(-1, 2),
        np.asarray(endings, dtype=np.int8),
        held_out_mask(path, keys),
        complaints,
    )


def _read(file: io.RawIOBase, place: np.ndarray) -> bytes | None:
    offset, size = map(int, place)
    file.seek(offset)
    data = bytearray()
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return bytes(data) if len(data) == size else None


def cache_folder() -> Path:
    """Where lists of shards are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle2_fast"


def _read_cached(path: Path, stamp: list) -> TarIndex | None:
    """The index in the cache; None if there is none of this state of the shard."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found, complaints = json.loads(str(file["stamp"]))
            if found != stamp:
                return None
            index = TarIndex(
                PackedStrings(file["keys"], file["ends"]), file["images"], file["captions"],
                file["endings"], file["held_out"], [tuple(each) for each in complaints],
            )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    count = len(index)
    shapes = (index.images.shape, index.captions.shape, index.endings.shape, index.held_out.shape)
    return index if shapes == ((count, 2), (count, 2), (count,), (count,)) else None


def _save(file: BinaryIO, stamp: list, index: TarIndex) -> None:
    np.savez(
        file, stamp=json.dumps([stamp, index.complaints]), keys=index.keys.data, ends=index.keys.ends,
        images=index.images, captions=index.captions, endings=index.endings, held_out=index.held_out,
    )  # fmt: skip


def _read_counts(path: Path, shards: int) -> list | None:
    """[samples, held-out samples, complaints] of each shard; None if they are not in the cache."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        checked = [[int(count), int(held), list(map(tuple, found))] for count, held, found in rows]
    except (OSError, ValueError, TypeError):
        return None
    return checked if len(checked) == shards else None


def _stamp(path: str) -> list:
    """What identifies the state of a shard; one that does not exist has one, too."""
    try:
        status = os.stat(path)
    except OSError:
        return [FORMAT, os.path.abspath(path), None, None]
    return [FORMAT, os.path.abspath(path), status.st_size, status.st_mtime_ns]


def write_cached(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Put a file into the cache. Nothing happens if it cannot be written: it only saves time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
