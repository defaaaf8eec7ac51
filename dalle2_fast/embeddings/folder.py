"""A folder of embeddings: the layout of clip-retrieval, with a record of what they were computed from.

    embeddings.json               the CLIP, the data, width and dtype
    img_emb/img_emb_0.npy         [N, E] of the images of shard 0, of unit norm
    text_emb/text_emb_0.npy       [N, E] of their captions
    metadata/metadata_0.parquet   image_path (the key), caption, row (number of the sample in its shard)

Numbers have as many digits as the last one needs, so that names sort. Samples without an image that can be
decoded, or without a caption, have no row. A part is complete when its metadata, which are written last,
exist. A prior also needs an encoding of every token of a caption; these are not stored, because they are more
bytes than the images (77 tokens of width 768 in float16: 118 kB), and the text tower that computes them is a
small part of CLIP (8% of the FLOPs of ViT-L/14).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_fast.data.sources import StreamedNames
from dalle2_fast.data.sources.base import Complaint, PackedStrings, Pair, PairSource, Remembered, SampleError

RECORD = "embeddings.json"
FORMAT_VERSION = 1
DTYPES = ("float16", "float32")
KINDS = {"img_emb": "npy", "text_emb": "npy", "metadata": "parquet"}  # in the order of writing


def part_path(folder: Path, kind: str, part: int, parts: int) -> Path:
    """The file of one kind of a part.

    Example:
        >>> part_path(Path("out"), "img_emb", 7, 12).as_posix()
        'out/img_emb/img_emb_07.npy'
    """
    return folder / kind / f"{kind}_{part:0{len(str(max(0, parts - 1)))}d}.{KINDS[kind]}"


def is_complete(folder: Path, part: int, parts: int) -> bool:
    """Whether a part has been written."""
    return part_path(folder, "metadata", part, parts).exists()


def describe_source(source: PairSource) -> dict[str, Any]:
    """What identifies data that may be moved: the names of their shards and the numbers of their samples."""
    return {"names": [os.path.basename(name) for name in source.names], "samples": list(source.counts)}


def as_utf8(key: str) -> str:
    """A key that is no valid text as one that a Parquet file can hold.

    Example:
        >>> as_utf8("0001" + chr(0xDCE9)).isascii()
        True
    """
    return key.encode("utf-8", "backslashreplace").decode()


def import_parquet():
    """pyarrow.parquet. ImportError, with what to install, without it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "embeddings need pyarrow, which is not installed: pip install 'dalle2-fast[train]'"
        ) from error
    return pyarrow.parquet


class EmbeddingFolder:
    """The embeddings in a folder, complete and all of one CLIP.

    Args:
        path: the folder.

    Attributes:
        width: E of an embedding.
        fingerprint: of the CLIP, see `fingerprint`.
        record: what embeddings.json holds.

    Raises:
        FileNotFoundError: there is no such folder, or no embeddings.json in it.
        ValueError: a part is missing, or a file is damaged.
        ImportError: pyarrow is not installed.
    """

    def __init__(self, path: str | PathLike) -> None:
        self.path = Path(path)
        import_parquet()
        self.record = _read_record(self.path)
        self.width, self.fingerprint = self.record["width"], self.record["clip"]
        self._parts = len(self.record["names"])
        missing = [part for part in range(self._parts) if not is_complete(self.path, part, self._parts)]
        if missing:
            first = part_path(self.path, "metadata", missing[0], self._parts)
            raise ValueError(
                f"--embeddings: {len(missing)} of {self._parts} parts are missing, the first is {first}: run "
                "dalle2-fast embed again, which goes on"
            )

    def check_clip(self, fingerprint: str, width: int, name: object) -> None:
        """Raise unless the embeddings are those of a CLIP.

        Args:
            fingerprint, width: of the CLIP.
            name: what the message calls it.

        Raises:
            ValueError: they are of another one.
        """
        if width != self.width:
            raise ValueError(
                f"--embeddings: {self.path} has embeddings of width {self.width}, got {name} of width {width}"
            )
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"--embeddings: {self.path} was computed by another CLIP ({self.fingerprint[:12]}) than "
                f"{name} ({fingerprint[:12]}): compute it with dalle2-fast embed --checkpoint of this run"
            )

    def attached_to(self, source: PairSource | StreamedNames, *, images: bool) -> EmbeddedSource:
        """The pairs of a source with their embeddings.

        Args:
            source: the data that the embeddings were computed from, maybe in another folder.
            images: whether images are read, too.

        Raises:
            ValueError: they were computed from other data, or from data that can only be streamed.
        """
        if isinstance(source, StreamedNames):
            raise ValueError(
                "--embeddings: expected data that can be read at any place, such as local tar shards, not "
                "compressed; got streamed shards"
            )
        found = describe_source(source)
        if len(found["names"]) != self._parts:
            raise ValueError(
                f"--embeddings: {self.path} has {self._parts} parts, got data of {len(found['names'])} shards"
            )
        for part, (name, count) in enumerate(zip(found["names"], found["samples"], strict=True)):
            expected = self.record["names"][part], self.record["samples"][part]
            if (name, count) != expected:
                raise ValueError(
                    f"--embeddings: part {part} of {self.path} is of {expected[0]} with {expected[1]:,} "
                    f"samples, got {name} with {count:,}"
                )
        return EmbeddedSource(self, source, images=images)

    def part(self, number: int) -> Part:
        """The embeddings of shard `number`. ValueError if its files are damaged or do not fit each other."""
        path, metadata = (part_path(self.path, kind, number, self._parts) for kind in ("img_emb", "metadata"))
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
            table = import_parquet().read_table(
                metadata, columns=["image_path", "row"], use_threads=False
            )
            keys, rows = table.column("image_path").to_pylist(), table.column("row").to_numpy()
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors, KeyErrors
            raise ValueError(f"--embeddings: part {number} of {self.path} cannot be read: {error}") from error
        if images.shape != (len(rows), self.width):
            raise ValueError(
                f"--embeddings: {path}: expected {len(rows)} rows of width {self.width}, got {images.shape}"
            )
        return Part(images, PackedStrings.of(keys), rows)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"--embeddings: {path} not found: first run dalle2-fast embed DATA {folder}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"expected format_version {FORMAT_VERSION}, got {record['format_version']!r}")
        is_whole = isinstance(record["clip"], str) and isinstance(record["width"], int)
        if not is_whole or len(record["names"]) != len(record["samples"]):
            raise ValueError("expected clip, width, and as many names as samples")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--embeddings: {path}: damaged record ({error!r})") from None
    return record


@dataclass(frozen=True)
class Part:
    """The embeddings of the images of a shard.

    Args:
        images: [N, E], mapped from the file.
        keys: of the samples.
        rows: [N], rising: the number of each sample in its shard.
    """

    images: np.ndarray
    keys: PackedStrings
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


class EmbeddedSource:
    """A `PairSource` whose pairs have the embeddings of their images.

    Args:
        folder: of the embeddings.
        source: of the pairs.
        images: whether images are read, too.
    """

    def __init__(self, folder: EmbeddingFolder, source: PairSource, *, images: bool) -> None:
        self._folder, self._source, self._images = folder, source, images
        self.kind, self.near = source.kind, source.near
        self.counts: list[int] = source.counts
        self.names: list[str] = source.names
        self._parts = Remembered(folder.part)

    def __getstate__(self) -> dict:  # background processes open the files themselves
        return self.__dict__ | {"_parts": Remembered(self._folder.part)}

    @property
    def complaints(self) -> Sequence[Complaint]:
        return self._source.complaints

    def held_out(self, shard: int) -> np.ndarray:
        return self._source.held_out(shard)

    def count_held_out(self, shard: int) -> int:
        return self._source.count_held_out(shard)

    def read(self, shard: int, row: int, *, image: bool = True) -> Pair:
        """A sample. SampleError if it has no embedding, because its image could not be decoded.

        Raises:
            ValueError: the shard has another sample in this place than when it was embedded.
        """
        part = self._parts(shard)
        index = int(np.searchsorted(part.rows, row))
        if index == len(part) or part.rows[index] != row:
            raise SampleError("no embedding", self.names[shard], f"sample {row}")
        pair = self._source.read(shard, row, image=image and self._images)
        if as_utf8(pair.key) != part.keys[index]:
            raise ValueError(
                f"--embeddings: {self.names[shard]} has changed since it was embedded: sample {row} was "
                f"{part.keys[index]}, got {pair.key}"
            )
        return pair._replace(embed=np.array(part.images[index]))
