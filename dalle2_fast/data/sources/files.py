"""Pictures in files of their own: a folder of them with captions, or a list of paths and captions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle2_fast.data.samples import CAPTION_KEYS, IMAGE_KEYS, caption_of
from dalle2_fast.data.sources.base import (
    ROWS,
    Complaint,
    PackedStrings,
    Pair,
    SampleError,
    held_out_mask,
)
from dalle2_fast.data.tar import LARGEST_FILE


class FolderSample(NamedTuple):
    """The files of one sample of a folder, relative to it."""

    key: str  # the common part of their names, with "/" between folders
    image: str | None
    caption: str | None


class _KeyedFiles:
    """What both sources know of their samples: the keys, cut into shards of ROWS."""

    def _set_keys(self, name: str, keys: Iterable[str]) -> None:
        self._keys = PackedStrings.of(keys)
        total = len(self._keys)
        self.counts = [min(ROWS, total - begin) for begin in range(0, total, ROWS)]
        self.names = [name] * len(self.counts)

    def held_out(self, shard: int) -> np.ndarray:
        begin = shard * ROWS
        return held_out_mask("", (self._keys[begin + row] for row in range(self.counts[shard])))

    def count_held_out(self, shard: int) -> int:
        return int(self.held_out(shard).sum())


class PictureFolder(_KeyedFiles):
    """A `PairSource` of NAME.jpg (jpeg, png, webp) with NAME.txt (caption, json), in sub-folders, too.

    Args:
        root: the folder. Links to folders are followed; each folder is read once.
    """

    kind, near = "folder of pictures", None

    def __init__(self, root: Path) -> None:
        self._root, self.complaints = root, []
        self._endings: list[tuple[str, str]] = []  # of image and caption, as they are spelled
        known: dict[tuple[str, str], int] = {}
        keys, endings = [], []
        for key, image, caption in walk(root):
            if image is None or caption is None:
                reason = "no image" if image is None else "no caption"
                self.complaints.append(Complaint(reason, str(root), f"sample {key}"))
                continue
            keys.append(key)
            endings.append(known.setdefault((image[len(key) :], caption[len(key) :]), len(known)))
        self._endings = list(known)
        self._spelled = np.asarray(endings, dtype=np.int16)
        self._set_keys(str(root), keys)

    def read(self, shard: int, row: int, *, image: bool = True) -> Pair:
        number = shard * ROWS + row
        key = self._keys[number]
        image_ending, caption_ending = self._endings[self._spelled[number]]
        text = read_file(self._root / (key + caption_ending), self.names[shard], key)
        data = read_file(self._root / (key + image_ending), self.names[shard], key) if image else None
        caption = caption_of({caption_ending[1:].lower(): text})
        return Pair(data, caption, self.names[shard], key)


class FileList(_KeyedFiles):
    """A `PairSource` of pairs (path of an image, caption), held in memory.

    Args:
        name: of the list, for messages.
        entries: (path, caption, key); an absolute path.
    """

    kind, near = "list of pictures", None

    def __init__(self, name: str, entries: Iterable[tuple[str, str, str]]) -> None:
        columns = list(zip(*entries, strict=True)) or [(), (), ()]
        self._paths, self._captions = map(PackedStrings.of, columns[:2])
        self._set_keys(name, columns[2])
        self.complaints: list[Complaint] = []

    def read(self, shard: int, row: int, *, image: bool = True) -> Pair:
        number = shard * ROWS + row
        key, name = self._keys[number], self.names[shard]
        data = read_file(Path(self._paths[number]), name, key) if image else None
        return Pair(data, self._captions[number].strip(), name, key)


def walk(root: Path) -> Iterator[FolderSample]:
    """The samples in a folder and its sub-folders, sorted by name; hidden files are left out.

    A picture without caption has None in its place. A caption file without picture is also yielded, except
    JSON files, which are often about other things.
    """
    for folder, names in _folders(root):
        samples: dict[str, dict[str, str]] = {}
        for name in names:
            stem, _, ending = name.rpartition(".")
            if stem and ending.lower() in (*IMAGE_KEYS, *CAPTION_KEYS):
                samples.setdefault(stem, {}).setdefault(ending.lower(), name)
        for stem in sorted(samples):
            files = samples[stem]
            image = next((files[ending] for ending in IMAGE_KEYS if ending in files), None)
            caption = next((files[ending] for ending in CAPTION_KEYS if ending in files), None)
            if image is not None or files.keys() != {"json"}:
                paths = (None if name is None else folder + name for name in (image, caption))
                yield FolderSample(folder + stem, *paths)


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(relative name with a "/" at its end, names of files) of a folder and of those in it."""
    waiting, seen = [""], set()
    while waiting:
        prefix = waiting.pop()
        status = os.stat(root / prefix)
        if (here := (status.st_dev, status.st_ino)) in seen:  # by another link, or in a loop of them
            continue
        seen.add(here)
        files, folders = [], []
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():  # no pipe, no device, no link to nothing
                    files.append(entry.name)
        yield prefix, sorted(files)
        waiting += [f"{prefix}{name}/" for name in sorted(folders, reverse=True)]


def read_file(path: Path, shard: str, key: str) -> bytes:
    """The content of a file. OSError, or SampleError if it is far too large for an image."""
    with open(path, "rb", buffering=0) as file:
        if (size := os.fstat(file.fileno()).st_size) > LARGEST_FILE:
            raise SampleError("file is too large", shard, f"{key}: {size:,} bytes")
        return file.read()
