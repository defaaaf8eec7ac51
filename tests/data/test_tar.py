"""Tar archives that are damaged, or made to harm their reader: intact files are read, in bounded memory."""

import bz2
import gzip
import io
import lzma
import random
import tarfile

import pytest

from dalle2_fast.data import tar as module
from dalle2_fast.data.tar import BLOCK, read_tar

FILES = [(f"{number:04d}.txt", f"file {number}".encode()) for number in range(6)]


def archive(files=FILES, form=tarfile.GNU_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return bytearray(out.getvalue())


def read(data):
    reports = []
    files = list(read_tar(io.BytesIO(bytes(data)), lambda *report: reports.append(report)))
    return files, reports


def signed(header):
    """A header with the right checksum for its content."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def test_every_compression_is_read():
    for compress in (bytes, gzip.compress, bz2.compress, lzma.compress):
        assert read(compress(bytes(archive()))) == (FILES, [])


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(form):
    files = [("folder/" * 40 + f"{number}ö.txt", b"x" * number) for number in range(3)]
    assert read(archive(files, form)) == (files, [])


@pytest.mark.parametrize("damage", [b"\xff" * BLOCK, b"\xff", bytes(BLOCK)])
def test_a_damaged_header_costs_one_file_and_is_reported(damage):
    """tarfile takes the first damaged header for the end of the archive: two of six files, no error."""
    data = archive()
    begin = 2 * 2 * BLOCK
    data[begin : begin + len(damage)] = damage
    assert read(data) == (FILES[:2] + FILES[3:], [("tar header is damaged", "after 0001.txt")])


def test_a_first_and_a_last_header():
    data = archive()
    data[3] ^= 0x40
    data[5 * 2 * BLOCK + 3] ^= 0x40
    files, reports = read(data)
    assert files == FILES[1:5]
    assert reports == [("tar header is damaged", where) for where in ("at the beginning", "after 0004.txt")]


def test_archives_behind_each_other():
    """`cat a.tar b.tar` is common; the zeros between them are no damage."""
    assert read(archive() + archive()) == (FILES + FILES, [])


def test_a_cut_archive_is_reported():
    assert read(archive()[: 5 * BLOCK + 3]) == (FILES[:2], [("shard is cut short", "in 0002.txt")])


@pytest.mark.parametrize("data, message", [(b"", "empty"), (b"<html>" * 1000, "not a tar archive")])
def test_what_is_no_archive(data, message):
    with pytest.raises(ValueError, match=message):
        read(data)


def test_a_size_that_the_archive_does_not_have():
    """A valid header may promise 8 GB, or a negative size."""
    data = archive()
    data[4 * BLOCK + 124 : 4 * BLOCK + 136] = b"77777777777\0"
    data[4 * BLOCK : 5 * BLOCK] = signed(data[4 * BLOCK : 5 * BLOCK])
    assert read(data) == (FILES[:2], [("shard is cut short", "in 0002.txt")])
    data[4 * BLOCK + 124 : 4 * BLOCK + 136] = b"\xff" * 12
    data[4 * BLOCK : 5 * BLOCK] = signed(data[4 * BLOCK : 5 * BLOCK])
    assert read(data) == (FILES[:2] + FILES[3:], [("tar header is damaged", "after 0001.txt")])


def test_a_file_that_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_FILE", 100)
    files = [("a.png", b"x" * 101), ("b.png", b"x" * 100)]
    assert read(archive(files)) == (files[1:], [("file is too large", "a.png: 101 bytes")])


def test_the_search_for_a_header_ends(monkeypatch):
    """Gigabytes of zeros, a few kilobytes when compressed, would be searched for minutes."""
    monkeypatch.setattr(module, "SEARCH", 10 * BLOCK)
    assert read(archive() + bytes(30 * BLOCK) + archive())[0] == FILES


def test_usual_headers_are_read_as_tarfile_reads_them():
    """Catches: a name, a size or a damaged header that the fast reader takes for another one."""
    draw = random.Random(0)
    usual = 0
    for _ in range(3000):
        folders = ("".join(draw.choices("aé.b ", k=20)) for _ in range(draw.randint(1, 5)))
        info = tarfile.TarInfo("/".join(folders))
        info.size = draw.choice([0, 5, 511, 512, 10**6, 2**33 + 1])
        info.type = draw.choice([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.AREGTYPE])
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-BLOCK:])
        if draw.random() < 0.5:
            header[draw.randrange(BLOCK)] ^= 1 << draw.randrange(8)
        if (found := module._usual_header(bytes(header))) is None:
            continue
        usual += 1
        expected = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
        assert found == (expected.name, expected.size, expected.type)
    assert usual > 500
