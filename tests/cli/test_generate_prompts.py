"""`dalle2-fast generate --prompts`: the same pictures for any batch and process, resume, refusals."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from dalle2_fast import DALLE2, cli
from dalle2_fast.data.samples import caption_of, group
from dalle2_fast.data.tar import read_tar
from tests.support.tiny_pipeline import tiny_pipeline

CAPTIONS = ["a red ring", "a blue square", "a ring above a square", "a blue ring", "a square"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_pipeline(upsampler=False).save_pretrained(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def generate(checkpoint, tmp_path, capsys):
    """generate(folder, *arguments, prompts=...) -> exit code, stderr."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(CAPTIONS) + "\n")

    def run(folder, *arguments, prompts=file):
        words = ["generate", "--prompts", str(prompts), "--output", str(tmp_path / folder), "--quiet"]
        options = ["--checkpoint", str(checkpoint), "--device", "cpu", "--dtype", "fp32"]
        code = cli.main([*words, *options, *arguments])
        return code, capsys.readouterr().err

    return run


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def pictures(folder):
    """key -> pixels, of plain files and of shards."""
    found = {path.stem: pixels(path.read_bytes()) for path in sorted(folder.glob("*.png"))}
    for shard in sorted(folder.glob("*.tar")):
        with open(shard, "rb") as file:
            for sample in group(read_tar(file, pytest.fail)):
                found[sample["__key__"]] = pixels(sample["png"])
    return found


def test_a_picture_depends_on_its_seed_alone(generate, tmp_path, monkeypatch):
    """Catches: a seed that depends on the batch, the process or the kind of output."""
    assert generate("files", "--seed", "3", "--num-images", "2")[0] == 0
    expected = pictures(tmp_path / "files")
    assert list(expected) == [f"{number:09d}" for number in range(10)]
    assert len({image.tobytes() for image in expected.values()}) == 10
    for count, folder in ((2, "shards"), (3, "others")):
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(count))
            sizes = ["--shard-size", "3"] if folder == "shards" else []
            options = ["--seed", "3", "--num-images", "2", "--batch-size", "2", *sizes]
            assert generate(folder, *options)[0] == 0
        made = pictures(tmp_path / folder)
        assert list(made) == list(expected)
        assert all(abs(made[key] - expected[key]).max() <= 1 for key in expected)


def test_the_json_says_how_to_make_the_picture_again(generate, checkpoint, tmp_path):
    """Catches: a recorded seed with which the pipeline makes another picture."""
    generate("made", "--seed", "5")
    facts = json.loads((tmp_path / "made" / "000000002.json").read_text())
    assert facts["caption"] == (tmp_path / "made" / "000000002.txt").read_text() == CAPTIONS[2]
    png = (tmp_path / "made" / "000000002.png").read_bytes()
    assert facts["sha256"] == hashlib.sha256(png).hexdigest()
    pipe = DALLE2.from_pretrained(checkpoint, device="cpu", dtype="fp32")
    (again,) = pipe(facts["caption"], 1, seed=facts["seed"], output_type="pil")
    assert abs(np.asarray(again).astype(int) - pixels(png)).max() <= 1


class Killed(BaseException):
    """As abrupt as a kill: nothing handles it."""


def kill_after(monkeypatch, calls):
    """Let DALLE2.generate raise in its call number `calls`; the list counts the pictures that are made."""
    made, inner = [], DALLE2.generate

    def generate(self, prompts, *args, **options):
        if len(made) == calls:
            raise Killed
        made.append(len(prompts))
        return inner(self, prompts, *args, **options)

    monkeypatch.setattr(DALLE2, "generate", generate)
    return made


@pytest.mark.parametrize("sizes", [[], ["--shard-size", "4"]])
def test_a_killed_run_repeats_nothing(generate, tmp_path, monkeypatch, sizes):
    """Catches: a resumed run that makes finished pictures again, or leaves one out."""
    options = ["--batch-size", "2", *sizes]
    generate("whole", "--seed", "3", *options)
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            generate("killed", "--seed", "3", *options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("0*")}
    assert not [path for path in before if path.suffix == ".tar"]
    made = kill_after(monkeypatch, -1)
    assert generate("killed", *options)[0] == 0  # without --seed: it is recorded
    assert sum(made) == len(CAPTIONS) - 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == names
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    made.clear()
    assert generate("killed", *options)[0] == 0 and made == []


@pytest.mark.parametrize("damage", ["cut in a header", "cut in a picture", "zeros", "another picture"])
def test_a_damaged_partial_shard_goes_on_after_its_last_whole_picture(
    generate, tmp_path, monkeypatch, damage
):
    """Catches: half of a picture, or one that a power cut has emptied, in a finished shard."""
    options = ["--seed", "3", "--shard-size", "5", "--batch-size", "1"]
    generate("whole", *options)
    expected = (tmp_path / "whole" / "00000.tar").read_bytes()
    with tarfile.open(tmp_path / "whole" / "00000.tar") as archive:
        place = archive.getmember("000000002.png")
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "generate.json").write_bytes((tmp_path / "whole" / "generate.json").read_bytes())
    left = bytearray(expected[: place.offset_data + place.size])
    if damage == "cut in a header":
        del left[place.offset + 100 :]
    elif damage == "cut in a picture":
        del left[place.offset_data + 60 :]
    elif damage == "zeros":
        left[place.offset :] = bytes(len(left) - place.offset)
    else:
        left = bytearray(expected)
        left[place.offset_data + 50] ^= 1
    (folder / ".00000.tar.partial").write_bytes(left)
    made = kill_after(monkeypatch, -1)
    assert generate("damaged", *options)[0] == 0
    assert len(made) == 3 and (folder / "00000.tar").read_bytes() == expected


def test_a_shard_trains(generate, tmp_path):
    """Catches: members in an order or with names that our own reader of shards takes for other samples."""
    generate("shards", "--shard-size", "5")
    with open(tmp_path / "shards" / "00000.tar", "rb") as file:
        assert [caption_of(sample) for sample in group(read_tar(file, pytest.fail))] == CAPTIONS


def test_two_commands_do_not_write_one_shard(generate, tmp_path):
    """Catches: a second start while the first one runs, after which a shard holds a mixture."""
    fcntl = pytest.importorskip("fcntl", reason="no flock here")
    (tmp_path / "busy").mkdir()
    with open(tmp_path / "busy" / ".00000.tar.partial", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, err = generate("busy", "--shard-size", "5")
    assert code == 2 and "another process is writing" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("crlf.txt", "a red ring\r\na square\r\n"),
        ("no-end.prompts", "\ufeffa red ring\na square"),
        ("some.csv", 'id,Caption\n1,"a red ring"\n2,a square\n'),
        ("some.tsv", "text\tid\na red ring\t1\na square\t2\n"),
        ("some.jsonl", '{"id": 1, "caption": "a red ring"}\n"a square"\n'),
        ("some.parquet", None),
    ],
)
def test_every_format_is_read(generate, tmp_path, name, content):
    """Catches: a format, a line end or a mark at the beginning that becomes part of a caption."""
    path = tmp_path / name
    if content is None:
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": [1, 2], "TEXT": ["a red ring", "a square"]}), path)
    else:
        path.write_bytes(content.encode())
    assert generate("out", prompts=path) == (0, "")
    texts = [file.read_text() for file in sorted((tmp_path / "out").glob("*.txt"))]
    assert texts == ["a red ring", "a square"]


def test_all_captions_with_an_error_are_named_before_weights_are_read(generate, tmp_path, monkeypatch):
    """Catches: an unknown word in line 20,000 that is found after an hour, and only the first of them."""
    monkeypatch.setattr(DALLE2, "from_pretrained", lambda *args, **options: pytest.fail("weights were read"))
    path = tmp_path / "bad.txt"
    path.write_text("a red ring\n\na zebra\n" + "a cat\n" * 10 + "a a a a a a a a\n")
    code, err = generate("out", prompts=path)
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "13 of 14 captions cannot be used: caption 2: it is empty; caption 3:" in err
    assert '"zebra"' in err and "caption 11:" in err and "caption 12:" not in err and "and 3 more" in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "--prompts: no such file"),
        ("empty.txt", "", "expected at least one caption"),
        ("a.csv", "id,words\n1,a ring\n", "expected a column caption or text, got id, words"),
        ("a.jsonl", '{"caption": "a ring"}\n{broken\n', "line 2: expected JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected a caption, got [1]"),
        ("a.txt", b"a r\xffd ring\n", "expected text in UTF-8"),
        ("a.parquet", "no parquet", "not a Parquet file"),
    ],
)
def test_wrong_files_are_one_line(generate, tmp_path, name, content, message):
    """Catches: a traceback, or a message without the file."""
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, err = generate("out", prompts=path)
    assert code == 2 and message in err and str(path) in err and err.count("\n") == 1


def test_another_command_is_refused(generate, tmp_path):
    """Catches: a folder with pictures of two seeds or settings."""
    generate("out", "--seed", "3")
    code, err = generate("out", "--seed", "4", "--steps", "3")
    assert code == 2 and "seed: the folder has 3, got 4" in err and "choose another folder" in err
    for arguments, message in (
        (["--individual", "x"], "--individual: is for a single caption"),
        (["--strength", "0.5"], "--strength: is for a single caption"),
        (["--tile", "16"], "tile: no upsampler runs"),
    ):
        code, err = generate("new", *arguments)
        assert code == 2 and message in err and not (tmp_path / "new").exists()


def test_wrong_processes_are_refused(generate, monkeypatch):
    """Catches: a share of no process, or standard input that only one of several processes can read."""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, err = generate("out")
    assert code == 2 and "expected RANK and WORLD_SIZE" in err and "RANK=2" in err
    monkeypatch.setenv("RANK", "1")
    code, err = generate("out")
    assert code == 2 and "--seed: expected one, because 2 processes share it" in err
    code, err = generate("out", prompts="-")
    assert code == 2 and "expected a file" in err


def test_shards_need_prompts(capsys):
    """Catches: an option that changes nothing."""
    assert cli.main(["generate", "a red ring", "--shard-size", "3"]) == 2
    assert "--shard-size: expected together with --prompts" in capsys.readouterr().err
