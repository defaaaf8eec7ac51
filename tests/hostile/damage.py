"""What can be done to any file: cut it, flip a byte, or put something else in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

HUGE = 10**9
FLIPPED = "a flipped byte in the weights"  # of which only a digest can know
Damage = Callable[[Path], None]  # rewrites a file in place


def content(data: bytes) -> Damage:
    return lambda path: void(path.write_bytes(data))


def void(_: object) -> None:
    return None


def cut(part: float) -> Damage:
    """Keep this part of the file; 1 cuts off the last byte."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: -1 if part == 1 else int(len(data) * part)])

    return damage


def flip(place: float) -> Damage:
    """Invert one byte at this part of the file."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(len(data) * place), len(data) - 1)] ^= 0xFF
        path.write_bytes(data)

    return damage


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"
HTML_PAGE = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>gone</body></html>\n"

ANY_FILE: dict[str, Damage] = {
    "empty": content(b""),
    "half": cut(0.5),
    "one byte short": cut(1),
    "zeros": content(bytes(4096)),
    "git lfs pointer": content(LFS_POINTER),
    "html page": content(HTML_PAGE),
    "a link to itself": loop,
    "a folder": folder,
}
