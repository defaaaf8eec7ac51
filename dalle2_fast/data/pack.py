"""Writes local pairs of any kind as WebDataset shards with the names of img2dataset.

    OUT/00000.tar      000000000.jpg, 000000000.txt (the caption), 000000000.json (its key in the data), ...
    OUT/00001.tar      000010000.jpg, ...
    OUT/pack.json      what was packed, so that an interrupted command goes on

Of the data in their order, each S samples make a shard; one that cannot be used leaves a gap. A shard is
written next to its place and renamed, and has the same bytes each time.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dalle2_fast.data.check import decode
from dalle2_fast.data.image_formats import open_image
from dalle2_fast.data.images import canonical
from dalle2_fast.data.pairs import IndexedPairs
from dalle2_fast.data.sources import StreamedNames, data_files, open_source
from dalle2_fast.data.sources.base import Complaint, Pair, SampleError
from dalle2_fast.data.sources.streamed import phrase, read_shard

RECORD = "pack.json"
SUFFIX = ".partial"
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # other formats are written as PNG


@dataclass
class Packed:
    """The result of `pack`.

    Args:
        shards: paths of all shards.
        written: how many of them this call has written; the others were there.
        samples: in the shards that were written.
        left_out: what could not be used of them.
    """

    shards: list[Path]
    written: int
    samples: int
    left_out: list[Complaint]


def pack(
    data: str | Path,
    out: str | Path,
    *,
    shard_size: int = 10_000,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Packed:
    """Write shards; those of an interrupted call with the same data and size are kept.

    Args:
        data: as of PairStream, except shards that can only be streamed.
        out: the folder of the shards; it is made if it does not exist.
        shard_size: samples in a shard, at least 1.
        progress: wraps the iteration over the shards.

    Raises:
        ValueError: shard_size is no int >= 1, `data` cannot be read at any place or have no sample, or `out`
            is not empty and not of such a call.
        OSError: a file cannot be written.
        as of PairStream: others about the data.
    """
    if not isinstance(shard_size, int) or shard_size < 1:
        raise ValueError(f"shard_size: expected an int >= 1, got {shard_size!r}")
    source, data, out = open_source(data), Path(data), Path(out)
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"out: expected a folder outside of the data {data}, got {out}")
    if isinstance(source, StreamedNames):
        raise ValueError(f"data: expected files that are read at any place, got {source.kind}")
    pairs = IndexedPairs(source, 0, 0, None)
    if not pairs.total:
        raise ValueError(f"data: {data} has no sample with an image and a caption")
    _claim(out, _describe(data, shard_size))

    shards = math.ceil(pairs.total / shard_size)
    paths = [out / f"{number:0{_digits(shards)}d}.tar" for number in range(shards)]
    result = Packed(paths, 0, 0, list(source.complaints))
    for number, path in enumerate(progress(paths)):
        if not path.exists():
            begin = number * shard_size
            samples = _usable(pairs, begin, min(begin + shard_size, pairs.total), result.left_out.append)
            with _replaced(path) as file:
                result.samples += _write(file, samples, _keys(number, shards, shard_size))
            result.written += 1
    return result


def verify(data: str | Path, packed: Packed, *, progress: Callable[[Iterable], Iterable] = iter) -> int:
    """Read all shards again, decode their images and compare them with the data.

    Args:
        data: what was packed.
        packed: the result of `pack`.
        progress: wraps the iteration over the shards.

    Returns:
        The number of samples.

    Raises:
        ValueError: a sample is missing, differs from the data, or cannot be decoded.
    """
    pairs = IndexedPairs(open_source(data), 0, 0, None)
    expected = _usable(pairs, 0, pairs.total, lambda complaint: None)
    found = 0
    for path in progress(packed.shards):
        complaints: list[Complaint] = []
        for sample in read_shard(str(path), complaints.append):
            _, pair, ending, image = next(expected, (0, None, "", b""))
            where = f"{path}, sample {sample['__key__']}"
            if pair is None or sample.get(ending) != image or sample.get("txt") != _text(pair):
                raise ValueError(f"out: {where} is not that of the data: delete {path} and pack again")
            found += 1
        if complaints:
            raise ValueError(f"out: {path}, {complaints[0].where}: {complaints[0].reason}")
    if next(expected, None) is not None:
        raise ValueError(f"out: the shards have {found:,} samples, fewer than the data: pack again")
    return found


def _describe(data: Path, shard_size: int) -> dict:
    """What determines the shards: names and sizes of the files, and samples in a shard."""
    files = data_files(data)
    root = data if data.is_dir() else data.parent
    listed = [[os.path.relpath(name, root), os.path.getsize(name)] for name in files]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return {"format_version": 1, "shard_size": shard_size, "files": len(files), "sha256": digest}


def _claim(out: Path, settings: dict) -> None:
    """Make the folder, or go on in it. ValueError if it is of something else."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / RECORD
    for leftover in out.glob(f".*{SUFFIX}"):
        leftover.unlink()
    if record.exists():
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != settings:
            raise ValueError(f"out: {out} has shards of other data or with another --shard-size")
    elif any(out.iterdir()):
        raise ValueError(f"out: expected an empty folder or one with {RECORD}, of an earlier call, got {out}")
    else:
        with _replaced(record) as file:
            file.write(json.dumps(settings, indent=1).encode())


def _usable(
    pairs: IndexedPairs, begin: int, end: int, report: Callable[[Complaint], object]
) -> Iterator[tuple[int, Pair, str, bytes]]:
    """(place after `begin`, pair, ending of its image, content) of the samples that can be used."""
    for position in range(begin, end):
        try:
            pair = pairs.pair(position)
        except SampleError as error:
            report(error.complaint)
            continue
        found = decode(pair.image)
        if isinstance(found, Exception):
            where = f"sample {pair.key}: {phrase(found)}"
            report(Complaint("image cannot be decoded", pair.shard, where))
        elif not pair.caption:
            reason = "caption is no text" if pair.caption is None else "no caption"
            report(Complaint(reason, pair.shard, f"sample {pair.key}"))
        elif found[2] in ENDINGS:
            yield position - begin, pair, ENDINGS[found[2]], pair.image
        else:
            yield position - begin, pair, "png", _as_png(pair.image)


def _as_png(data: bytes) -> bytes:
    file = io.BytesIO()
    with open_image(io.BytesIO(data)) as image:
        canonical(image).save(file, "PNG")
    return file.getvalue()


def _write(
    file: BinaryIO, samples: Iterable[tuple[int, Pair, str, bytes]], key_of: Callable[[int], str]
) -> int:
    """Write a shard; the number of its samples."""
    count = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for place, pair, ending, image in samples:
            key = key_of(place)
            facts = {"key": key, "caption": pair.caption, "source": pair.key}
            files = {ending: image, "txt": _text(pair), "json": json.dumps(facts).encode()}
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")  # of no user and no time: the same bytes each time
                info.size, info.mode = len(content), 0o644
                tar.addfile(info, io.BytesIO(content))
            count += 1
    return count


def _text(pair: Pair) -> bytes:
    return pair.caption.encode(errors="replace")


def _digits(shards: int) -> int:
    return max(5, len(str(shards - 1)))


def _keys(number: int, shards: int, shard_size: int) -> Callable[[int], str]:
    """Place in a shard -> key, the numbers of shard and place, with as many digits as in img2dataset."""
    digits = len(str(shard_size - 1)) if shard_size > 1 else 0
    return lambda place: f"{number:0{_digits(shards)}d}" + (f"{place:0{digits}d}" if digits else "")


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the block ends, and disappears if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"out: {path} cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
