"""Every kind of data is recognised and read alike, and what is none of them is named."""

from __future__ import annotations

import csv
import json
import os
import pickle
import random
from collections import Counter

import pytest
import torch

from dalle2_fast.data import PairStream, WordTokenizer
from dalle2_fast.data.sources import data_files, recognise
from tests.data.pairs.making import caption, picture, write_pictures, write_shards

COUNT = 20
WORDS = WordTokenizer(["picture"])


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(folder, **columns):
    """The rows of a list of pictures that are written to folder/pictures."""
    pictures = sorted(write_pictures(folder / "pictures", COUNT).rglob("*.png"))
    return [
        {columns.get("image", "path"): str(path.relative_to(folder)),
         columns.get("caption", "caption"): caption(number)}
        for number, path in enumerate(pictures)
    ]  # fmt: skip


def tars(folder):
    return write_shards(folder / "tars", [6, 10, 4])


def streamed(folder):
    return write_shards(folder / "tars", [6, 10, 4], compressed=True)


def pictures(folder):
    data = write_pictures(folder / "pictures", COUNT)
    (data / "000" / "notes.json").write_text("{}")
    for name in "abcdefghijkl":  # links in loops, with more paths than can be walked
        (data / name).mkdir()
        for other in "abcdefghijkl":
            (data / name / f"link{other}").symlink_to(data / other, target_is_directory=True)
        (data / name / "back").symlink_to(data, target_is_directory=True)
    os.mkfifo(data / "000" / "pipe.png")  # reading it would wait for ever
    (data / "000" / "pipe.txt").write_text("a pipe")
    return data


def write_csv(folder, name, delimiter, encoding, image="path", text="caption"):
    entries = rows(folder, image=image, caption=text)
    with open(folder / name, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(entries[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(entries)
    return folder / name


def comma_list(folder):
    return write_csv(folder, "list.csv", ",", "utf-8-sig")


def tab_list(folder):
    return write_csv(folder, "list.tsv", "\t", "utf-16", image="IMAGE", text="TEXT")


def parquet_paths(folder):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows(folder)), folder / "list.parquet")
    return folder / "list.parquet"


def parquet_pictures(folder):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = folder / "parquet"
    folder.mkdir()
    for part in range(2):
        numbers = range(part * 10, part * 10 + 10)
        table = [{"image": {"bytes": picture(n), "path": None}, "text": [caption(n)]} for n in numbers]
        parquet.write_table(arrow.Table.from_pylist(table), folder / f"{part}.parquet", row_group_size=4)
    return folder


def imagefolder(folder):
    write_pictures(folder / "train", COUNT)
    lines = []
    for path in sorted((folder / "train").rglob("*.png")):
        lines.append({"file_name": str(path.relative_to(folder / "train")), "text": caption(int(path.stem))})
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def dataset(folder):
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [{"bytes": picture(number), "path": None} for number in range(COUNT)],
        "text": [caption(number) for number in range(COUNT)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict(columns, features=features)
    both = datasets.DatasetDict({"train": made, "test": made})
    both.save_to_disk(folder / "saved", num_shards={"train": 3, "test": 1})
    return folder / "saved"


KINDS = (
    tars, streamed, pictures, comma_list, tab_list, parquet_paths, parquet_pictures, imagefolder, dataset,
)  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:data. no image")
def test_every_kind_gives_every_sample_once(make, tmp_path):
    """Catches: a kind that is not recognised; a picture with another's caption; samples that are lost."""
    data = make(tmp_path)
    stream = PairStream(data, 5, (4,), tokenizer=WORDS, shuffle=8)
    batches = [stream.batch(step) for step in range(4)]
    assert Counter(sum((batch["captions"] for batch in batches), [])) == Counter(map(caption, range(COUNT)))
    for batch in batches:
        for image, text in zip(batch["images"][4], batch["captions"], strict=True):
            number = int(text.split("number")[1])
            red = torch.full((4, 4), number * 37 % 256 / 255)
            torch.testing.assert_close(image[0], red)
    again = pickle.loads(pickle.dumps(PairStream(data, 5, (4,), tokenizer=WORDS, shuffle=8)))
    assert again.batch(2)["captions"] == batches[2]["captions"], "as a process that is spawned receives it"
    assert all(os.path.isfile(name) for name in data_files(data))


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:data. no image")
def test_a_hash_of_the_key_holds_out_samples_of_every_kind(make, tmp_path, monkeypatch):
    """Catches: a split that overlaps, loses samples, or differs after the data were moved."""
    monkeypatch.setattr("dalle2_fast.data.sources.base.HELD_OUT", 4)
    (tmp_path / "a").mkdir()
    data = make(tmp_path / "a")
    held = PairStream(data, 1, (4,), tokenizer=WORDS, split="held_out").first(99)["captions"]
    train = PairStream(data, 1, (4,), tokenizer=WORDS, split="train").first(99)["captions"]
    assert sorted(held + train) == sorted(map(caption, range(COUNT))) and 0 < len(held) < COUNT / 2
    (tmp_path / "a").rename(tmp_path / "b")
    moved = PairStream(tmp_path / "b" / data.relative_to(tmp_path / "a"), 1, (4,), tokenizer=WORDS,
                       split="held_out").first(99)  # fmt: skip
    assert moved["captions"] == held


def test_what_is_no_data_is_named(tmp_path):
    """Catches: an error that does not say what is accepted; addresses that are downloaded without a word."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data that are read here: expected tar shards .* CSV"):
        recognise(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="absent: expected tar shards"):
        recognise(tmp_path / "absent")
    (tmp_path / "a.csv").write_text("url,caption\nhttps://host/a.jpg,red\n")
    with pytest.raises(ValueError, match="img2dataset downloads them"):
        PairStream(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("path,label\na.jpg,3\n")
    with pytest.raises(ValueError, match=r"b.csv: expected a column of the caption .* got path, label"):
        PairStream(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="files of one kind"):
        recognise([tmp_path / "a.csv", *tars(tmp_path).iterdir()])


def test_absent_pyarrow_is_named(tmp_path, monkeypatch):
    data = parquet_paths(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow.*dalle2-fast\[train\]"):
        PairStream(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_samples_that_cannot_be_used_are_replaced(tmp_path):
    """Catches: a picture of 0 bytes, one that has vanished or grown, a caption in another encoding, that ends
    a training."""
    data = write_pictures(tmp_path / "pictures", COUNT)
    files = sorted(data.rglob("*.png"))
    stream = PairStream(data, COUNT, (4,), tokenizer=WORDS)
    files[0].write_bytes(b"")
    files[1].unlink()
    files[2].with_suffix(".txt").write_bytes(b"caf\xe9 number2")
    files[3].with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    with open(files[4], "wb") as file:
        file.truncate(2**40)
    batch = stream.batch(0)
    assert len(batch["captions"]) == COUNT
    used = {text for text in batch["captions"] if text.startswith("picture")}
    assert used == {caption(number) for number in range(5, COUNT)}
    assert "caf\N{REPLACEMENT CHARACTER} number2" in batch["captions"]
    assert stream.skipped == {
        "image cannot be decoded": 1, "sample cannot be read": 1, "file is too large": 1, "no caption": 1,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_shard_that_shrinks_or_vanishes_costs_its_samples(tmp_path):
    """Catches: a training that ends when a file is removed under it."""
    data = write_shards(tmp_path / "tars", [4, 4, 12])
    stream = PairStream(data, COUNT, (4,), tokenizer=WORDS)
    (data / "00000.tar").unlink()
    with open(data / "00001.tar", "r+b") as file:
        file.truncate(600)
    captions = stream.batch(0)["captions"]
    assert set(captions) == {caption(number) for number in range(8, COUNT)}
    assert stream.skipped == {"sample cannot be read": 4, "shard has changed": 4}


@pytest.mark.parametrize("make", [comma_list, parquet_paths, parquet_pictures, imagefolder, dataset])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")
def test_damaged_files_are_read_or_refused_in_one_line(make, tmp_path):
    """Catches: an error of a library without the name of the file, a crash, an endless search."""
    data = make(tmp_path)
    place = data if data.is_dir() else data.parent
    endings = (".csv", ".parquet", ".jsonl", ".arrow", "state.json")
    files = [path for path in sorted(place.rglob("*")) if path.name.endswith(endings)]
    draw, refused = random.Random(0), 0
    for _ in range(25):
        path = draw.choice(files)
        good = path.read_bytes()
        begin = draw.randrange(len(good))
        overwritten = good[:begin] + draw.randbytes(8) + good[begin + 8 :]
        path.write_bytes(draw.choice([b"", good[:begin], overwritten, bytes(999)]))
        try:
            PairStream(data, 4, (4,), tokenizer=WORDS).batch(0)
        except (ValueError, OSError) as error:
            refused += 1
            assert "data: " in str(error) and len(str(error).splitlines()) == 1, error
        path.write_bytes(good)
    assert refused


def test_halves_of_surrogate_pairs_in_metadata(tmp_path):
    """Catches: a caption that no file can hold, which ends the listing."""
    data = imagefolder(tmp_path)
    metadata = data / "train" / "metadata.jsonl"
    lines = metadata.read_text().replace("picture number3", r"\ud800 number3")
    metadata.write_text(lines.replace("00004.png", r"\ud800.png"))
    with pytest.warns(UserWarning, match="sample cannot be read"):
        captions = PairStream(data, COUNT, (4,), tokenizer=WORDS).batch(0)["captions"]
    assert "? number3" in captions and caption(4) not in captions
