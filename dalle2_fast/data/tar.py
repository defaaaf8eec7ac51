"""The files in a tar archive, read as a stream or only listed; damage costs only the files that it hits.

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
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

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
    return ((name, data) for name, _, _, data in _walk(_decompressed(stream), report))


def list_tar(file: BinaryIO, report: Callable[[str, str], object]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The places of the regular files of an archive, in order; only headers are read.

    Args:
        file: the archive, open for reading in binary mode, seekable, and not compressed.
        report: as of `read_tar`.

    Yields:
        (name, (offset, size)): the content is `size` bytes from `offset` on.

    Raises:
        ValueError: the file is empty, or holds no tar archive.
        OSError: it cannot be read.

    Example:
        >>> file = io.BytesIO()
        >>> with tarfile.open(fileobj=file, mode="w") as tar:
        ...     tar.addfile(tarfile.TarInfo("a.txt"))
        >>> list(list_tar(file, print))
        [('a.txt', (512, 0))]
    """
    return ((name, (offset, size)) for name, offset, size, _ in _walk(_Seeking(file), report))


def is_compressed(begin: bytes) -> bool:
    """Whether a file that begins with these bytes (at least 6) is compressed by gzip, bzip2 or xz."""
    return any(begin.startswith(magic) for magic in COMPRESSIONS)


def _walk(
    reader: BinaryIO | _Seeking, report: Callable[[str, str], object]
) -> Iterator[tuple[str, int, int, bytes | None]]:
    """(name, offset, size, content) of the regular files; a _Seeking reader passes over the contents."""
    is_listed = isinstance(reader, _Seeking)
    last, searched, is_lost, place = None, 0, False, 0
    records: dict[str, str] = {}  # name and size of the next file, where they do not fit into its header
    while searched <= SEARCH and (block := reader.read(BLOCK)):
        place += len(block)
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
        if is_listed and info.isreg():
            data = reader.skip(size)
        else:
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
            yield name, place, size, data
        place += size + -size % BLOCK
    if last is None and (is_lost or not searched):
        raise ValueError("it is not a tar archive" if is_lost else "it is empty")
    if is_lost:
        report("tar header is damaged", f"after {last}")


class Header(NamedTuple):
    """What a header says about the next file."""

    name: str
    size: int
    type: bytes

    def isreg(self) -> bool:
        return self.type in tarfile.REGULAR_TYPES


def _header(block: bytes) -> Header | None:
    if block == ZEROS:  # the end of an archive, after which another one may follow
        return None
    if (header := _usual_header(block)) is not None:
        return header
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return Header(info.name, info.size, info.type) if info.size >= 0 else None


def _usual_header(block: bytes) -> Header | None:
    """The header of a regular file as most programs write it, five times as fast as tarfile reads it; None
    for any other, also for a damaged one."""
    if len(block) != BLOCK or block[156:157] != tarfile.REGTYPE or block[257:262] != b"ustar":
        return None
    found, size = block[148:156].strip(b"\0 "), block[124:136].strip(b"\0 ")
    if not found.isdigit() or not size.isdigit():
        return None
    try:
        total, length = int(found, 8) - 256 + sum(block[148:156]), int(size, 8)
    except ValueError:  # 8 or 9
        return None
    # The lower half of Adler-32 is 1 + the sum of all bytes, modulo 65521.
    if zlib.adler32(block) & 0xFFFF != (1 + total) % 65521:
        return None
    name, prefix = (block[begin:end].partition(b"\0")[0] for begin, end in ((0, 100), (345, 500)))
    return Header(_text(prefix + b"/" + name if prefix else name), length, tarfile.REGTYPE)


def _size(records: dict[str, str], info: Header) -> int:
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


class _Seeking:
    """A seekable archive, of which whole files can be passed over without reading them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def skip(self, size: int) -> bytes | None:
        """Pass over a file: b"", or None if the archive ends before."""
        begin = self._file.tell()
        if begin + size > self._end:
            return None
        self._file.seek(min(begin + size + -size % BLOCK, self._end))
        return b""
