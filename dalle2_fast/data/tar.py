"""The files in a tar archive that is read as a stream; damage costs only the files that it hits.

Python's tarfile takes a damaged header for the end of the archive or, with ignore_zeros=True, skips it in
silence. Here the next valid header is searched for, and what is lost is reported.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

BLOCK = 512
ZEROS = bytes(BLOCK)
SEARCH = 64 << 20  # bytes in which another header is searched for; 3 s for what is no header
LARGEST_FILE = 256 << 20  # bytes; an image or a caption is far smaller
LARGEST_RECORDS = 1 << 20  # bytes of the headers of long names
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
WITHOUT_CONTENT = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE,
                   tarfile.FIFOTYPE)  # fmt: skip
COMPRESSIONS = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


def read_tar(stream: BinaryIO, report: Callable[[str, str], object]) -> Iterator[tuple[str, bytes]]:
    """The regular files of an archive, in order.

    Args:
        stream: the archive, maybe compressed by gzip, bzip2 or xz; only its `read` is called.
        report: called with (reason, where) for what is lost. The reasons are "tar header is damaged",
            "file is too large" and "shard is cut short".

    Yields:
        (name, content).

    Raises:
        ValueError: the stream is empty, or holds no tar archive.
        OSError, EOFError, zlib.error, lzma.LZMAError: the stream cannot be read or decompressed.

    Example:
        >>> file = io.BytesIO()
        >>> with tarfile.open(fileobj=file, mode="w") as tar:
        ...     tar.addfile(tarfile.TarInfo("a.txt"))
        >>> list(read_tar(io.BytesIO(file.getvalue()), print))
        [('a.txt', b'')]
    """
    reader = _decompressed(stream)
    last, searched, is_lost = None, 0, False
    records: dict[str, str] = {}  # name and size of the next file, where they do not fit into its header
    while searched <= SEARCH and (block := reader.read(BLOCK)):
        if (info := _header(block)) is None:
            is_lost |= block != ZEROS
            searched, records = searched + BLOCK, {}
            continue
        if is_lost:
            report("tar header is damaged", f"after {last}" if last else "at the beginning")
        searched, is_lost = 0, False
        name, size = records.get("path", info.name), _size(records, info)
        last = name if info.type not in LONG_NAMES else last or name
        if info.type in WITHOUT_CONTENT:
            records = {}
            continue
        is_small = size <= (LARGEST_FILE if info.isreg() else LARGEST_RECORDS)
        data = _read(reader, size) if is_small else _skip(reader, size)
        if data is None:
            report("shard is cut short", f"in {name}")
            return
        if info.type in LONG_NAMES and is_small:
            is_pax = info.type != tarfile.GNUTYPE_LONGNAME
            records |= _pax_records(data) if is_pax else {"path": _text(data.partition(b"\0")[0])}
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):  # other headers of the next file
            records = {}
        if info.isreg() and not is_small:
            report("file is too large", f"{name}: {size:,} bytes")
        elif info.isreg() and info.type != tarfile.GNUTYPE_SPARSE:
            yield name, data
    if last is None and (is_lost or not searched):
        raise ValueError("it is not a tar archive" if is_lost else "it is empty")
    if is_lost:
        report("tar header is damaged", f"after {last}")


def _header(block: bytes) -> tarfile.TarInfo | None:
    if block == ZEROS:  # the end of an archive, after which another one may follow
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return info if info.size >= 0 else None


def _size(records: dict[str, str], info: tarfile.TarInfo) -> int:
    size = records.get("size", "")
    return int(size) if size.isdecimal() and len(size) < 20 else info.size


def _pax_records(data: bytes) -> dict[str, str]:
    """The records "<length> <name>=<value>\\n" of an extended header."""
    records = {}
    while (found := re.match(rb"(\d{1,8}) ([^=]+)=", data)) and int(found[1]) > found.end():
        length = int(found[1])
        records[_text(found[2])] = _text(data[found.end() : length - 1])
        data = data[length:]
    return records


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _read(reader: BinaryIO, size: int) -> bytes | None:
    """The content of a file, after which the next header follows; None if the archive ends before."""
    data = reader.read(size + -size % BLOCK)
    return data[:size] if len(data) >= size else None


def _skip(reader: BinaryIO, size: int) -> bytes | None:
    """Read a file without keeping it: b"", or None if the archive ends before."""
    left = size + -size % BLOCK
    while left > 0:
        if not (data := reader.read(min(left, 1 << 20))):
            return None
        left -= len(data)
    return b""


def _decompressed(stream: BinaryIO) -> BinaryIO:
    begin = stream.read(BLOCK)
    reader = io.BufferedReader(_Rejoined(begin, stream), 1 << 16)
    for magic, decompress in COMPRESSIONS.items():
        if begin.startswith(magic):
            return decompress(reader)
    return reader


class _Rejoined(io.RawIOBase):
    """The first bytes of a stream, read to find out its compression, followed by the others."""

    def __init__(self, begin: bytes, rest: BinaryIO) -> None:
        self._begin, self._rest = begin, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._begin[: len(buffer)] or self._rest.read(len(buffer))
        self._begin = self._begin[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
