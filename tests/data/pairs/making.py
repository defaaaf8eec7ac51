"""Small data of every kind that a PairStream reads; the caption of a sample is unique."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

from PIL import Image


def picture(number: int, side: int = 12) -> bytes:
    """A PNG whose colour depends on the number."""
    file = io.BytesIO()
    color = (number * 37 % 256, number * 101 % 256, number * 11 % 256)
    Image.new("RGB", (side, side), color).save(file, "PNG")
    return file.getvalue()


def caption(number: int) -> str:
    return f"picture number{number}"


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: list[int], *, compressed: bool = False) -> Path:
    """Shards with so many samples; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        files = []
        for _ in range(size):
            files += [(f"{number:05d}.png", picture(number)), (f"{number:05d}.txt", caption(number).encode())]
            number += 1
        path = write_tar(folder / f"{shard:05d}.tar", files)
        if compressed:
            path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    return folder


def write_pictures(folder: Path, count: int, per_folder: int = 7) -> Path:
    """Pictures with captions in sub-folders; returns the folder."""
    for number in range(count):
        place = folder / f"{number // per_folder:03d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}.png").write_bytes(picture(number))
        (place / f"{number:05d}.txt").write_text(caption(number))
    return folder
