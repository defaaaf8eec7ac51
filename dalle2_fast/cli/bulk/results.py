"""What `generate --prompts` writes: plain files or WebDataset shards, in a folder that says what it holds.

A picture is three files, KEY.png, KEY.txt and KEY.json; its key is its number with nine digits. Shard n has
the pictures from n * size on and is called n.tar, with five digits. Until it is complete it is called
.n.tar.partial, and each batch is appended and flushed: a process that was killed goes on after the last whole
picture.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dalle2_fast.checkpoints.atomic import SUFFIX, atomic_write

RECORD = "generate.json"  # what all pictures of a folder have in common
BLOCK = tarfile.BLOCKSIZE

Picture = dict[str, bytes]  # ending -> content; "json" is the last, and has the sha256 of "png"


def key_of(number: int) -> str:
    """The key of a picture, as img2dataset writes keys.

    Example:
        >>> key_of(7)
        '000000007'
    """
    return f"{number:09d}"


def recorded_seed(folder: Path) -> int | None:
    """The seed of the pictures in a folder; None if it has none."""
    try:
        seed = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("seed")
    except (OSError, ValueError, AttributeError):  # `agree_on_record` says what is wrong
        return None
    return seed if isinstance(seed, int) else None


class Files:
    """Pictures as plain files; one is complete when its KEY.json exists, which is written last.

    Attributes:
        missing: the numbers of the pictures that are not complete.
    """

    def __init__(self, folder: Path, numbers: range) -> None:
        self._folder = folder
        self.missing = [number for number in numbers if not (folder / f"{key_of(number)}.json").exists()]

    def add(self, batch: Iterable[tuple[int, Picture]]) -> None:
        """Write the files of some pictures, each file whole or not at all."""
        for number, picture in batch:
            for ending, content in picture.items():
                with atomic_write(self._folder / f"{key_of(number)}.{ending}") as temporary:
                    temporary.write_bytes(content)


class Shard:
    """Pictures as a WebDataset shard that is being written; `open_shard` opens it.

    Attributes:
        missing: the numbers of the pictures that it does not hold yet; they are added in this order.
    """

    def __init__(self, file: BinaryIO, numbers: range) -> None:
        self._file = file
        done, end = _whole_pictures(file, numbers.start)
        self.missing = list(numbers[done:])
        file.truncate(end)
        file.seek(end)

    def add(self, batch: Iterable[tuple[int, Picture]]) -> None:
        """Append the next pictures and flush them to the disk."""
        batch = list(batch)
        for number, picture in batch:
            for ending, content in picture.items():
                self._file.write(_member(f"{key_of(number)}.{ending}", content))
        self._flush()
        del self.missing[: len(batch)]

    def close(self) -> None:
        """Write the end of the archive."""
        self._file.write(bytes(2 * BLOCK))
        self._flush()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def open_shard(folder: Path, number: int, numbers: range) -> Iterator[Shard | None]:
    """Begin a shard or go on with it; it gets its name when the block has added all its pictures.

    Args:
        folder: of the results.
        number: of the shard.
        numbers: of its pictures.

    Yields:
        The shard; None if it is complete.

    Raises:
        OSError: it cannot be written, or another process writes it.
    """
    path = folder / f"{number:05d}.tar"
    if path.exists():
        yield None
        return
    partial = path.with_name(f".{path.name}{SUFFIX}")
    try:
        with open(partial, "r+b" if partial.exists() else "x+b") as file:
            if not _lock(file):
                raise OSError(f"--output: another process is writing {partial}; wait for its end")
            shard = Shard(file, numbers)
            yield shard
            if shard.missing:
                return
            shard.close()
            with atomic_write(path) as temporary:
                os.replace(partial, temporary)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"--output: {path}: cannot be written ({error.strerror})") from error


def _whole_pictures(file: BinaryIO, first: int) -> tuple[int, int]:
    """How many pictures a partial shard holds from its beginning on, and where the last of them ends."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    done = end = 0
    picture: Picture = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                key, _, ending = member.name.partition(".")
                after = member.offset_data + member.size + -member.size % BLOCK
                if after > size or key != key_of(first + done):
                    break
                picture[ending] = archive.extractfile(member).read()
                if ending == "json":
                    if json.loads(picture["json"])["sha256"] != hashlib.sha256(picture["png"]).hexdigest():
                        break
                    done, end, picture = done + 1, after, {}
    except (tarfile.TarError, ValueError, KeyError, AttributeError):  # cut, or zeros after a power cut
        pass
    return done, end


def _member(name: str, content: bytes) -> bytes:
    """A file of a tar archive: header, content, padding. Its time is 0, for shards that repeat."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


def _lock(file: BinaryIO) -> bool:
    """Lock an open file until it is closed or the process ends; False if another process has it."""
    try:
        import fcntl
    except ImportError:  # Linux and macOS have it
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
