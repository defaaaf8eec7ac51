"""Image files for the command line that are damaged, or made to harm their reader."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


def png(side: int = 32, shade: int = 90) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (shade, 2 * shade % 256, 7)).save(out, format="PNG")
    return out.getvalue()


def noise(kind: str, side: int = 64, **options) -> bytes:
    """An image that hardly compresses, so that damage hits its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def bomb_png(side: int = 60_000) -> bytes:
    """A valid PNG of side x side black pixels, two megabytes long."""
    packer = zlib.compressobj(1)
    row = bytes(1 + side // 8)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@cache
def text_bomb() -> bytes:
    """A small PNG whose text chunk inflates to half a gigabyte."""
    packer = zlib.compressobj(1)
    text = b"".join(packer.compress(bytes(1 << 20)) for _ in range(512)) + packer.flush()
    good = png()
    return good[:33] + chunk(b"zTXt", b"caption\0\0" + text) + good[33:]


def promised(side: int) -> bytes:
    """A PNG whose header promises side x side pixels, with those of a small one."""
    good = png()
    return good[:8] + chunk(b"IHDR", struct.pack(">II", side, side) + good[24:29]) + good[33:]


def tiff_of_itself() -> bytes:
    """A TIFF whose next directory is its first one."""
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, format="TIFF")
    data = bytearray(out.getvalue())
    (begin,) = struct.unpack("<I", data[4:8])
    (entries,) = struct.unpack("<H", data[begin : begin + 2])
    end = begin + 2 + 12 * entries
    data[end : end + 4] = struct.pack("<I", begin)
    return bytes(data)


def postscript() -> bytes:
    return (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
        b"(%pipe%touch \"$DALLE2_FAST_SENTINEL\") (w) file closefile showpage\n"
    )  # fmt: skip


def flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(data) // 2] ^= 0xFF
    return bytes(changed)


# name -> (content, whether it must be read)
IMAGES: dict[str, tuple[Callable[[], bytes], bool]] = {
    "good": (png, True),
    "a png of 3.6 billion pixels": (bomb_png, False),
    "a png that promises 65,000 x 65,000": (lambda: promised(65_000), False),
    "a png that promises 5,000 x 5,000": (lambda: promised(5_000), False),
    "a text of half a gigabyte in a png": (text_bomb, False),
    "half a png": (lambda: noise("PNG")[:6000], False),
    "half a jpeg": (lambda: noise("JPEG")[:2000], False),
    "half a webp": (lambda: noise("WEBP", lossless=True)[:2000], False),
    "half a gif": (lambda: noise("GIF")[:1500], False),
    "a flipped byte in a png": (lambda: flipped(noise("PNG")), False),
    "a tiff whose directories are a circle": (tiff_of_itself, True),
    "postscript": (postscript, False),
    "empty": (lambda: b"", False),
    "zeros": (lambda: bytes(4096), False),
    "an html page": (lambda: b"<!DOCTYPE html><html>404</html>", False),
    "noise": (lambda: bytes(np.random.default_rng(1).integers(0, 256, 4096, dtype=np.uint8)), False),
    "a header alone": (lambda: png()[:33], False),
}  # fmt: skip
ODD_FILES: dict[str, Callable[[Path], None]] = {
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
}


def read(path: Path) -> str:
    """The image as the command line reads it."""
    from dalle2_fast.cli.image_files import open_image, square_image

    tensor, _ = square_image(open_image(path, "image"), path, 16)
    return f"{tuple(tensor.shape)}"
