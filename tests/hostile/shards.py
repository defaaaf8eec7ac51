"""Shards of image-caption pairs that are damaged, or made to harm their reader."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from tests.hostile.images import bomb_png, png, postscript, text_bomb

SAMPLES = 12


def member(name: str, data: bytes, **more) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def write(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data) if data or info.isreg() else None)
    return path


def plain(**replaced: tuple[str, bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
    """SAMPLES good samples; replaced: caption4, image4, ... -> the (ending, content) that takes its place."""
    members = []
    for number in range(SAMPLES):
        members.append(member(f"{number:04d}.png", png(shade=number * 7)))
        ending, data = replaced.get(f"caption{number}", ("txt", f"image number {number} in red".encode()))
        members.append(member(f"{number:04d}.{ending}", data))
        if f"image{number}" in replaced:
            ending, data = replaced[f"image{number}"]
            members[-2] = member(f"{number:04d}.{ending}", data)
    return members


def edit(change: Callable[[bytearray, list[int]], bytes]) -> Callable[[Path], Path]:
    """A good shard with its bytes changed; the change is given the bytes and where the headers lie."""

    def make(path: Path) -> Path:
        write(path, plain())
        with tarfile.open(path) as tar:
            headers = [info.offset for info in tar]
        path.write_bytes(change(bytearray(path.read_bytes()), headers))
        return path

    return make


def signed(size: bytes) -> Callable[[bytearray, list[int]], bytes]:
    """A header in the middle gets another size and the checksum that belongs to it."""

    def change(content: bytearray, headers: list[int]) -> bytes:
        begin = headers[len(headers) // 2]
        content[begin + 124 : begin + 136] = size
        content[begin + 148 : begin + 156] = b" " * 8
        content[begin + 148 : begin + 156] = b"%06o\0 " % sum(content[begin : begin + 512])
        return bytes(content)

    return change


def overwritten(start: int, data: bytes) -> Callable[[bytearray, list[int]], bytes]:
    def change(content: bytearray, headers: list[int]) -> bytes:
        content[headers[len(headers) // 2] + start : headers[len(headers) // 2] + start + len(data)] = data
        return bytes(content)

    return change


def flipped_third_header(content: bytearray, headers: list[int]) -> bytes:
    content[headers[2] + 3] ^= 0x40
    return bytes(content)


def gzip_bomb(path: Path) -> Path:
    path = path.with_suffix(".tar.gz")
    with gzip.open(path, "wb", compresslevel=1) as file:
        block = bytes(1 << 24)
        for _ in range(32):
            file.write(block)
    return path


def long_name_bomb(path: Path) -> Path:
    """After the good samples, a name of half a gigabyte, two megabytes when it is compressed."""
    path = path.with_suffix(".tar.gz")
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 29
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in plain():
            tar.addfile(info, io.BytesIO(data))
        content = inner.getvalue()[: tar.offset]
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(content + long.tobuf(tarfile.GNU_FORMAT))
        for _ in range(32):
            file.write(b"a" * (1 << 24))
    return path


def sparse_bomb(path: Path) -> Path:
    """A sparse file that claims 8 GB of zeros and holds none of them."""
    info, data = member("0000.png", b"", pax_headers={
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0000.png",
        "GNU.sparse.realsize": str(1 << 33),
    })  # fmt: skip
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(data))
        for other, content in plain()[2:]:
            tar.addfile(other, io.BytesIO(content))
    return path


def good(path: Path, **replaced: tuple[str, bytes]) -> Path:
    return write(path, plain(**replaced))


DEEP = b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

# name -> (maker of the shard, how many of the samples must still be read)
SHARDS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "good": (good, SAMPLES),
    "a damaged header in the middle": (edit(overwritten(0, b"\xff" * 512)), SAMPLES - 1),
    "one byte of the third header": (edit(flipped_third_header), SAMPLES - 1),
    "cut in half": (edit(lambda content, headers: bytes(content[: len(content) // 2])), SAMPLES // 2 - 1),
    "a size beyond the end": (edit(overwritten(124, b"77777777777\0")), SAMPLES - 1),
    "a negative size": (edit(overwritten(124, b"\xff" * 12)), SAMPLES - 1),
    "a size beyond the end, signed": (edit(signed(b"77777777777\0")), SAMPLES // 2),
    "a negative size, signed": (edit(signed(b"\xff" * 12)), SAMPLES - 1),
    "a name of half a gigabyte": (long_name_bomb, SAMPLES),
    "a sparse file of 8 GB": (sparse_bomb, SAMPLES - 1),
    "zeros over a header": (edit(overwritten(0, bytes(512))), SAMPLES - 1),
    "two archives": (
        lambda path: (good(path), path.write_bytes(2 * path.read_bytes()))[0], SAMPLES,
    ),
    "a caption nested deeply": (lambda path: good(path, caption4=("json", DEEP)), SAMPLES - 1),
    "a caption that is a list": (
        lambda path: good(path, caption4=("json", b'{"caption": ["red", "blue"]}')), SAMPLES - 1,
    ),
    "a caption that is an object": (
        lambda path: good(path, caption4=("json", b'{"caption": {"red": 1}}')), SAMPLES - 1,
    ),
    "a caption that is no utf-8": (lambda path: good(path, caption4=("txt", b"caf\xe9 red")), SAMPLES - 1),
    "an empty caption": (lambda path: good(path, caption4=("txt", b"")), SAMPLES - 1),
    "an image bomb": (lambda path: good(path, image4=("png", bomb_png())), SAMPLES - 1),
    "postscript for an image": (lambda path: good(path, image4=("png", postscript())), SAMPLES - 1),
    "a text of half a gigabyte in an image": (
        lambda path: good(path, image4=("png", text_bomb())), SAMPLES - 1,
    ),
    "half an image": (lambda path: good(path, image4=("png", png(200)[:300])), SAMPLES - 1),
    "text for an image": (lambda path: good(path, image4=("png", b"not an image")), SAMPLES - 1),
    "names outside of the folder": (
        lambda path: write(path, [*plain(), member("../../../tmp/dalle2_fast_escaped.txt", b"escaped")]),
        SAMPLES,
    ),
    "a link to itself": (
        lambda path: write(path, [*plain(), member("a.png", b"", type=tarfile.SYMTYPE, linkname="a.png")]),
        SAMPLES,
    ),
    "a device": (lambda path: write(path, [*plain(), member("a.png", b"", type=tarfile.CHRTYPE)]), SAMPLES),
    "empty": (lambda path: (path.write_bytes(b""), path)[1], 0),
    "zeros": (lambda path: (path.write_bytes(bytes(10240)), path)[1], 0),
    "no tar at all": (lambda path: (path.write_bytes(b"<html>" * 1000), path)[1], 0),
    "a gzip bomb": (gzip_bomb, 0),
}  # fmt: skip
