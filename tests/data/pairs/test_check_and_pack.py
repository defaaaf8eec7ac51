"""`dalle2-fast data check` and `data pack`, also on damaged and hostile data."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile

import pytest
from PIL import Image

from dalle2_fast.cli import main
from dalle2_fast.data import PairStream, WordTokenizer
from tests.data.pairs.making import caption, picture, write_pictures, write_shards, write_tar

WORDS = WordTokenizer(["picture"])


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words):
    return main(["data", *map(str, words), "--quiet"])


def damaged_shards(folder):
    """Two good shards and one with every kind of fault."""
    write_shards(folder, [4, 5])
    huge = tarfile.TarInfo("huge.png")
    huge.size = 2**40
    good, bad = picture(9), [
        ("a.png", b""), ("a.txt", b"of 0 bytes"),
        ("b.png", picture(8)), ("b.txt", b" "),
        ("c.png", picture(8)),
        ("d.txt", b"alone"),
        ("e.png", picture(8)[:45]), ("e.txt", b"half of a picture"),
        ("../../escaped.png", good := picture(9)), ("../../escaped.txt", "au\xdfen".encode("latin-1")),
        ("f.png", good), ("f.json", b'{"caption": 3}'),
    ]  # fmt: skip
    path = write_tar(folder / "00002.tar", bad)
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end] + huge.tobuf())
    return folder


def test_check_names_everything_that_is_broken(tmp_path, capsys):
    """Catches: a fault that is not found, or without shard and key; an exit code that hides it."""
    data = damaged_shards(tmp_path / "data")
    assert run("check", data, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["usable"] == 10 and report["shards"] == 3
    found = {(each["reason"], each["where"].split(":")[0]) for each in report["broken"]}
    assert all(each["shard"] == str(data / "00002.tar") for each in report["broken"])
    assert found == {
        ("image cannot be decoded", "sample a"), ("no caption", "sample b"), ("no caption", "sample c"),
        ("no image", "sample d"), ("image cannot be decoded", "sample e"), ("caption is no text", "sample f"),
        ("shard is cut short", "in huge.png"),
    }  # fmt: skip
    assert run("check", data) == 1
    text = capsys.readouterr().out
    assert "tar shards: 10 usable samples in 3 shards" in text and "broken: 7" in text
    assert f"    {data / '00002.tar'}, sample d" in text
    assert run("check", data / "0000{0,1}.tar") == 0


def test_check_counts_sizes_captions_and_keys(tmp_path, capsys):
    """Catches: a wrong number in the report, for shards that are listed and that are streamed."""
    for compressed in (False, True):
        data = write_shards(tmp_path / str(compressed), [4], compressed=compressed)
        write_tar(data / "b.tar", [("00000.png", picture(1, side=200)), ("00000.txt", b"one two three")])
        assert run("check", data, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["widths"] == report["heights"] == [12, 12, 200]
        assert report["shorter_sides"] == {"below 64": 4, "128 to 255": 1} and report["formats"] == {"PNG": 5}
        assert report["letters"] == [13, 15, 15] and report["words"] == [2, 2, 3]
        assert report["repeated_keys"] == {"00000": 2} and report["broken"] == []


def test_the_contact_sheet(tmp_path, capsys):
    data = write_pictures(tmp_path / "data", 70)
    assert run("check", data, "--contact-sheet", tmp_path / "sheet.png") == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 8 * 128, "8 x 8 pictures"
    assert "folder of pictures: 70 usable samples" in capsys.readouterr().out


def contents(path):
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def test_pack_writes_shards_with_the_names_of_img2dataset(tmp_path, capsys):
    """Catches: a name, an order or bytes that differ from call to call; a sample that is lost."""
    data = write_pictures(tmp_path / "data", 12)
    gif = io.BytesIO()
    Image.new("P", (4, 4)).save(gif, "GIF")
    (data / "000" / "00001.png").write_bytes(gif.getvalue())  # of a format that has no name in shards
    for out in ("a", "b"):
        assert run("pack", data, tmp_path / out, "--shard-size", 10, "--verify") == 0
    assert "verified: 12 samples" in capsys.readouterr().out
    names = ["00000.tar", "00001.tar", "pack.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    first, second = (contents(tmp_path / "a" / name) for name in names[:2])
    assert list(first)[:4] == ["000000.png", "000000.txt", "000000.json", "000001.png"]
    assert second["000011.txt"].decode() == caption(11) and second["000011.png"] == picture(11)
    assert json.loads(second["000011.json"])["source"] == "001/00011"
    assert Image.open(io.BytesIO(first["000001.png"])).format == "PNG"
    stream = PairStream(tmp_path / "a", 12, (4,), tokenizer=WORDS)
    assert sorted(stream.batch(0)["captions"]) == sorted(map(caption, range(12)))


def test_an_interrupted_pack_goes_on_and_others_are_refused(tmp_path, capsys, monkeypatch):
    """Catches: shards of two data sets in one folder, half a shard, one that is written again."""
    data, out = write_pictures(tmp_path / "data", 12), tmp_path / "out"
    assert run("pack", data, out, "--shard-size", 5) == 0
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "00001.tar").unlink()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    assert run("pack", data, out, "--shard-size", 5) == 2
    assert f"dalle2-fast: out: {out / '00001.tar'} cannot be written (full)" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "00002.tar", "pack.json"]
    monkeypatch.undo()
    assert run("pack", data, out, "--shard-size", 5) == 0
    assert ": 1, with 5 samples, 2 were there" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert run("pack", data, out, "--shard-size", 6) == 2
    assert "has shards of other data or with another --shard-size" in capsys.readouterr().err
    assert run("pack", data, tmp_path) == 2 and "expected an empty folder" in capsys.readouterr().err
    assert run("pack", data, data / "out") == 2 and "outside of the data" in capsys.readouterr().err


def test_pack_leaves_out_what_is_broken_and_writes_only_into_its_folder(tmp_path, capsys):
    """Catches: names of the data, such as ../../escaped, as names of files or members; a broken sample that
    ends the command; a damaged packed shard that is called right."""
    data, out = damaged_shards(tmp_path / "x" / "y" / "data"), tmp_path / "x" / "y" / "out"
    assert run("pack", data, out, "--shard-size", 100, "--verify") == 0
    assert "left out: 7" in capsys.readouterr().out
    assert os.listdir(tmp_path / "x") == ["y"] and sorted(os.listdir(out)) == ["00000.tar", "pack.json"]
    members = contents(out / "00000.tar")
    assert len(members) == 30 and all(name.split(".")[0].isdecimal() for name in members)
    shard = bytearray((out / "00000.tar").read_bytes())
    shard[shard.index(b"picture number3")] ^= 1
    (out / "00000.tar").write_bytes(shard)
    assert run("pack", data, out, "--shard-size", 100, "--verify") == 2
    assert "sample 0000003 is not that of the data" in capsys.readouterr().err


def test_options_are_checked(tmp_path, capsys):
    data = write_pictures(tmp_path / "data", 2)
    streamed = write_shards(tmp_path / "streamed", [2], compressed=True)
    for words, message in (
        (["check", data, "--verify"], "--verify: is for data pack, got data check"),
        (["pack", data], "OUT: expected the folder of the shards, got none"),
        (["pack", data, tmp_path / "o", "--shard-size", 0], "--shard-size: expected at least 1, got 0"),
        (["check", data, "--threads", 0], "--threads: expected at least 1, got 0"),
        (["check", tmp_path / "absent"], "absent: expected tar shards"),
        (["check", "pipe:cat a.tar"], "--allow-pipe"),
        (["pack", streamed, tmp_path / "o"], "got streamed shards"),
        (["check", data, "--contact-sheet", tmp_path / "no" / "a.png"], "is no folder"),
    ):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
