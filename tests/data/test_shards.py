"""WebDatasetStream on tiny shards made here."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dalle2_fast.data.shards import SkippedSample, WebDatasetStream, expand_shards, to_square
from dalle2_fast.data.text.bpe import BPETokenizer
from dalle2_fast.data.text.tokenizer import WordTokenizer

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def picture(color, size=(40, 30), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def write_shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for index, sample in enumerate(samples):
            for suffix, data in sample.items():
                info = tarfile.TarInfo(f"{index:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def samples(count, offset=0):
    """Samples whose caption names the colour of the image and the number of the sample."""
    names = list(COLORS)
    for index in range(offset, offset + count):
        name = names[index % 3]
        yield {"png": picture(COLORS[name]), "txt": f"A {name} picture, number{index}.".encode()}


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip("webdataset")
    for index in range(3):
        write_shard(tmp_path / f"data-{index}.tar", samples(10, offset=10 * index))
    return tmp_path


def same(a, b):
    images = all(torch.equal(a["images"][size], b["images"][size]) for size in a["images"])
    return images and torch.equal(a["tokens"], b["tokens"]) and a["captions"] == b["captions"]


def test_images_belong_to_their_captions(shards):
    stream = WebDatasetStream(str(shards / "data-{0..2}.tar"), 7, (8, 16), shuffle=20)
    seen = []
    for step in range(6):
        batch = stream.batch(step)
        assert batch["images"][8].shape == (7, 3, 8, 8) and batch["images"][16].shape == (7, 3, 16, 16)
        assert batch["tokens"].dtype == torch.int64
        rows = zip(batch["images"][16], batch["tokens"], batch["captions"], strict=True)
        for image, tokens, caption in rows:
            name = caption.split()[1]
            torch.testing.assert_close(image[:, 5, 5], torch.tensor(COLORS[name]) / 255)
            assert name in stream.tokenizer.decode(tokens).split()
            seen.append(caption)
    assert len(set(seen[:30])) == 30, "the first pass shows every sample once"
    assert seen[:7] != sorted(seen[:7]), "shuffled"


def test_resume_is_exact(shards):
    options = dict(batch_size=4, resolutions=(8,), seed=3, shuffle=10)
    straight = WebDatasetStream(shards, **options)
    batches = [straight.batch(step) for step in range(12)]  # over the end of the first pass
    assert same(WebDatasetStream(shards, **options).batch(9), batches[9])
    assert same(straight.batch(2), batches[2]), "backwards"
    other = WebDatasetStream(shards, **(options | {"seed": 4}))
    assert not same(other.batch(0), batches[0])


@pytest.mark.filterwarnings("ignore:data. no")
def test_bad_samples_are_counted_and_reported(tmp_path):
    pytest.importorskip("webdataset")
    bad = [
        {"png": b"not a picture", "txt": b"damaged"},
        {"png": picture("red"), "txt": b"  "},
        {"txt": b"a caption alone"},
        {"png": picture("red")},
        {"jpg": picture("red", kind="JPEG"), "json": b"{broken"},
        {"jpg": picture("red", kind="JPEG"), "json": b"[" * 100_000},
    ]
    good = [{"jpg": picture("blue", kind="JPEG"), "json": json.dumps({"caption": "a blue one"}).encode()}]
    write_shard(tmp_path / "a.tar", bad + good * 3)
    with pytest.warns(UserWarning, match="image cannot be decoded"):
        stream = WebDatasetStream(tmp_path / "a.tar", 4, (8,), shuffle=0)
        batch = stream.batch(0)  # the damaged one and the three good ones
    assert batch["captions"] == ["a blue one"] * 4
    assert batch["images"][8][0, 2].min() > 0.95
    assert stream.skipped == {"image cannot be decoded": 1, "no caption": 4, "no image": 1}


def test_warnings_name_shard_and_sample(tmp_path):
    """Pillow's own message is about <_io.BytesIO object at 0x7f...>."""
    pytest.importorskip("webdataset")
    shard = write_shard(tmp_path / "a.tar", [{"png": b"not a picture", "txt": b"red"}, *samples(3)])
    stream = WebDatasetStream(shard, 4, (8,), tokenizer=WordTokenizer(["red"]), shuffle=0)
    assert stream.summary() is None
    with pytest.warns(SkippedSample) as caught:
        stream.batch(0)
    (warning,) = caught
    reason = "it is no image that Pillow can read (1 so far)"
    assert str(warning.message) == f"data: image cannot be decoded: {shard}, sample 0000: {reason}"
    assert stream.summary() == "skipped 1 samples or parts of shards: 1 image cannot be decoded"


@pytest.mark.filterwarnings("ignore:data. no image")
def test_damage_costs_one_sample(tmp_path):
    """One flipped byte in the third header of a shard must not drop the rest of the shard."""
    pytest.importorskip("webdataset")
    shard = write_shard(tmp_path / "a.tar", samples(12))
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[2].offset
    data = bytearray(shard.read_bytes())
    data[header + 3] ^= 0x40
    shard.write_bytes(data)
    with pytest.warns(SkippedSample, match=f"tar header is damaged: {shard}, after 0000.txt"):
        stream = WebDatasetStream(shard, 11, (8,), shuffle=0)
        captions = stream.batch(0)["captions"]
    assert len(set(captions)) == 11
    assert stream.skipped == {"tar header is damaged": 1, "no image": 1}


@pytest.mark.parametrize(
    "record, caption",
    [
        ({"caption": ["a red one", "red"]}, "a red one"),
        ({"caption": [" ", 3, "a red one"]}, "a red one"),
        ({"caption": None, "text": "a red one"}, "a red one"),
        (["a red one"], "a red one"),
        ({"caption": {"en": "a red one"}}, None),
        ({"caption": 3}, None),
        ({"caption": [["a red one"]]}, None),
    ],
)
def test_captions_of_json_are_text(tmp_path, record, caption):
    """str() of a list or an object would be trained on as a caption."""
    pytest.importorskip("webdataset")
    other = {"png": picture("red"), "txt": b"other"}
    files = [{"png": picture("red"), "json": json.dumps(record).encode()}, other]
    stream = WebDatasetStream(
        write_shard(tmp_path / "a.tar", files), 1, (8,), tokenizer=WordTokenizer(["red"]), shuffle=0
    )
    if caption is None:
        with pytest.warns(SkippedSample, match="caption is no text: .*, sample 0000"):
            assert stream.batch(0)["captions"] == ["other"]
    else:
        assert stream.batch(0)["captions"] == [caption]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_tokenizer_decides_which_captions_are_empty(tmp_path):
    """CLIP's tokenizer reads emoji and signs, which have no words."""
    pytest.importorskip("webdataset")
    captions = ["\U0001f600", "!?", " ", "red"]
    files = [{"png": picture("red"), "txt": text.encode()} for text in captions]
    shard = write_shard(tmp_path / "a.tar", files)
    all_but_blank = [text for text in captions if text != " "]
    for tokenizer, expected in ((BPETokenizer(), all_but_blank), (WordTokenizer(["red"]), ["red"])):
        stream = WebDatasetStream(shard, 1, (8,), tokenizer=tokenizer, shuffle=0)
        assert {stream.batch(step)["captions"][0] for step in range(len(captions))} == set(expected)


def test_unreadable_shards(tmp_path):
    pytest.importorskip("webdataset")
    write_shard(tmp_path / "good.tar", samples(4))
    (tmp_path / "bad.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.warns(UserWarning, match="shard cannot be read"):
        stream = WebDatasetStream(tmp_path, 2, (8,), tokenizer=WordTokenizer(["red"]))
        assert len(stream.batch(3)["captions"]) == 2
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no sample with an image"):
        WebDatasetStream(tmp_path / "bad.tar", 2).batch(0)
    with pytest.raises(FileNotFoundError, match="missing.tar"):
        WebDatasetStream(tmp_path / "missing.tar", 2)


def test_absent_library_is_named(monkeypatch, tmp_path):
    """Catches: a message without the name of the extra; local shards that need the library."""
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"webdataset.*dalle2-fast\[train\]"):
        WebDatasetStream("https://host/a.tar")
    assert WebDatasetStream(write_shard(tmp_path / "a.tar", samples(1)), 1).batch(0)["captions"]


def test_given_tokenizer_cuts_and_marks_unknown_words(shards):
    tokenizer = WordTokenizer(["a", "red", "green", "blue"], context_length=5)
    row = WebDatasetStream(shards, 4, (8,), tokenizer=tokenizer).batch(0)["tokens"][0]
    assert row[0] == 1 and row[1] == 4 and row[3] == 3 and row[4] == 2


def test_square_is_central_and_averaged():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:4], pixels[:, 4:6], pixels[:, 6:] = 100, 200, 255
    pixels[::2, 4:6] = 0
    square = to_square(Image.fromarray(pixels), 2)
    assert square[0].tolist() == [[100, 100], [100, 100]], "the four central columns, each 2 x 2 averaged"
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert to_square(clear, 2).min() == 255, "transparent pixels lie on white"
    assert to_square(Image.new("L", (3, 5), 7), 8).shape == (3, 8, 8)


def test_grey_of_16_bits_is_scaled_and_not_cut_at_255(tmp_path):
    """convert("RGB") cuts every value above 255 and would train on such images as white."""
    pytest.importorskip("webdataset")
    file = io.BytesIO()
    Image.fromarray(np.full((6, 4), 30000, np.uint16)).save(file, "PNG")
    write_shard(tmp_path / "a.tar", [{"png": file.getvalue(), "txt": b"a grey field"}])
    images = WebDatasetStream(tmp_path, 2, (2, 8), shuffle=0).batch(0)["images"]
    for resolution in (2, 8):  # reduced by area and enlarged
        expected = torch.full((2, 3, resolution, resolution), 30000 / 65535)
        torch.testing.assert_close(images[resolution], expected, atol=0.5 / 255, rtol=0)


def test_expand_shards(tmp_path):
    pytest.importorskip("webdataset")
    for name in ("b.tar", "a.tar"):
        write_shard(tmp_path / name, [])
    expected = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert expand_shards(tmp_path) == expand_shards(f"{tmp_path}/*.tar") == expected
    assert expand_shards([f"{tmp_path}/{{b,a}}.tar", "https://host/{1..2}.tar"]) == [
        expected[1], expected[0], "https://host/1.tar", "https://host/2.tar"]  # fmt: skip
    with pytest.raises(ValueError, match="at least one"):
        expand_shards([])


@pytest.mark.filterwarnings("ignore:data. image cannot be decoded")
def test_a_batch_of_undecodable_images_is_replaced_and_resumes_exactly(tmp_path):
    """Catches: one bad image that ends the training at batch size 1, and at the same step after --resume;
    a replacement that depends on what was read before."""
    pytest.importorskip("webdataset")
    mixed = list(samples(6))
    mixed[2]["png"] = mixed[3]["png"] = b"not a picture"
    write_shard(tmp_path / "a.tar", mixed)
    for batch_size, shuffle in ((1, 0), (2, 0), (1, 3)):
        options = dict(batch_size=batch_size, resolutions=(8,), shuffle=shuffle)
        straight = WebDatasetStream(tmp_path, **options)
        batches = [straight.batch(step) for step in range(8)]
        assert all(batch["images"][8].shape == (batch_size, 3, 8, 8) for batch in batches)
        for step in range(8):
            assert same(WebDatasetStream(tmp_path, **options).batch(step), batches[step])
    for sample in mixed:
        sample["png"] = b"not a picture"
    write_shard(tmp_path / "a.tar", mixed)
    with pytest.raises(ValueError, match="no image can be decoded"):
        WebDatasetStream(tmp_path, 2, (8,)).batch(0)


def test_the_held_out_split_is_disjoint_and_each_of_it_is_seen_once(tmp_path):
    """Catches: metrics of held-out data on images that are trained on, or on one image many times."""
    pytest.importorskip("webdataset")
    for index in range(4):
        write_shard(tmp_path / f"data-{index}.tar", samples(50, offset=50 * index))
    train = WebDatasetStream(tmp_path, 10, (8,), split="train")
    seen = {caption for step in range(60) for caption in train.batch(step)["captions"]}
    held = WebDatasetStream(tmp_path, 1, (8,), split="held_out").first(500)
    assert len(set(held["captions"])) == len(held["captions"]) == len(held["images"][8])
    assert 2 <= len(held["captions"]) <= 20  # 200 / 25 are expected
    assert not seen & set(held["captions"])
    assert len(seen) + len(held["captions"]) == 200
    assert len(WebDatasetStream(tmp_path, 1, (8,)).first(3)["captions"]) == 3
    with pytest.raises(ValueError, match="split: expected one of"):
        WebDatasetStream(tmp_path, 1, split="test")
    write_shard(tmp_path / "one.tar", samples(1))
    one = WebDatasetStream(tmp_path / "one.tar", 1, split="held_out", tokenizer=train.tokenizer)
    assert one.first(9) is None
