"""CLIP's byte-pair tokenizer: open_clip's ids on hard strings, the rows around them, other vocabularies.

bpe_expected.json was written by the SimpleTokenizer of open_clip 2.32, which is run again if it is installed.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle2_fast import CLIP, DALLE2, DiffusionPrior, cli
from dalle2_fast.data import BPETokenizer, WordTokenizer, tokenizer_from_config
from dalle2_fast.data.text.bpe import byte_letters, clean, clip_merges
from dalle2_fast.models.transformer import token_lengths
from tests.support.tiny_pipeline import load_on_cpu, tiny_pipeline

CASES = json.loads((Path(__file__).parent / "bpe_expected.json").read_text(encoding="utf-8"))
TOKENIZER = BPETokenizer()


@pytest.mark.parametrize("case", CASES, ids=[str(index) for index in range(len(CASES))])
def test_ids_are_those_of_open_clip(case):
    """Another cleaning, pattern, byte alphabet or order of merges changes the ids of at least one case."""
    assert TOKENIZER.tokenize(case["text"]) == case["ids"]


def test_rows_and_texts_are_those_of_open_clip_itself():
    """Whole rows, cut rows and decoding, on the cases and on random mixtures of scripts and signs."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    theirs, draw = open_clip.tokenizer.SimpleTokenizer(), random.Random(0)
    signs = "abc'sT&;!é漢字🙂‘’ \n一½Ⅷ١ſ<>/w_ﬁＡ\u0301\u200d"
    texts = [case["text"] for case in CASES]
    texts += ["".join(draw.choice(signs) for _ in range(draw.randrange(40))) for _ in range(500)]
    assert torch.equal(TOKENIZER.encode(texts, truncate=True), theirs(texts))
    assert torch.equal(BPETokenizer(9).encode(texts, truncate=True), theirs(texts, context_length=9))
    for text in texts:
        ids = theirs.encode(text)
        assert TOKENIZER.decode(ids) == theirs.decode(ids).strip() or theirs.eot_token_id in ids


def test_merges_of_any_order_equal_the_plain_algorithm():
    """A heap that gives a pair twice, or a pair whose symbol has been merged with its other neighbour."""

    def plainly(word: str) -> list[str]:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while pairs := [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in ranks]:
            best, merged, place = min(pairs, key=ranks.get), [], 0
            while place < len(symbols):
                hit = tuple(symbols[place : place + 2]) == best
                merged.append("".join(best) if hit else symbols[place])
                place += 2 if hit else 1
            symbols = merged
        return symbols

    ranks = {tuple(merge.split()): rank for rank, merge in enumerate(clip_merges())}
    draw = random.Random(0)
    for _ in range(300):
        word = "".join(draw.choice("aehnorst") for _ in range(draw.randrange(1, 25)))
        assert [TOKENIZER._names[index] for index in TOKENIZER.tokenize(word)] == plainly(word)


def test_a_very_long_word_takes_seconds():
    """A quadratic merge would take hours for this."""
    assert len(TOKENIZER.tokenize("ab" * 200_000)) > 1000


# ------------------------------------------------------------------------------------------------------ rows


def test_rows():
    row = TOKENIZER.encode("a cat")[0]
    assert row.dtype == torch.int64 and row.shape == (77,)
    assert row[:4].tolist() == [49406, 320, 2368, 49407] and not row[4:].any()
    assert TOKENIZER.encode([]).shape == (0, 77)
    assert TOKENIZER.encode(["a", "b"]).shape == (2, 77)
    assert TOKENIZER.encode("")[0, :3].tolist() == [49406, 49407, 0], "no text is a caption, too"
    assert TOKENIZER.vocab_size == 49408


def test_an_exclamation_mark_is_not_padding():
    """id 0 is "!": a mask of the non-zero ids would hide it, and one of HF's would end the caption there."""
    rows = TOKENIZER.encode(["stop!", "! ! !", "stop"])
    assert (rows[1, 1:4] == TOKENIZER.encode("!")[0, 1]).all()
    bare = torch.tensor([[49406, 0, 0, 49407, 0, 0]])
    assert token_lengths(bare).tolist() == [4]
    small = dict(dim_text=16, dim_image=16, dim_latent=8, text_enc_depth=1, text_heads=2, visual_enc_depth=1,
                 visual_heads=2, visual_image_size=16, visual_patch_size=8)
    _, _, mask = CLIP(**small).encode_text(rows)
    assert mask.sum(1).tolist() == [len(TOKENIZER.tokenize(text)) + 2 for text in ("stop!", "! ! !", "stop")]


def test_long_captions():
    exactly = "word " * 75
    assert TOKENIZER.encode(exactly)[0, -1] == TOKENIZER.eos
    with pytest.raises(ValueError, match="the caption has 76 tokens: expected at most 75"):
        TOKENIZER.encode(["fine", exactly + "word"])
    cut = TOKENIZER.encode(exactly + "word", truncate=True)
    assert torch.equal(cut, TOKENIZER.encode(exactly))


def test_decode():
    text = "a red ring, 2 cats' tails & naïve 🙂 !"
    assert TOKENIZER.decode(TOKENIZER.encode(text)[0]) == "a red ring , 2 cats ' tails & naïve 🙂 !"
    assert TOKENIZER.decode(TOKENIZER.encode("")[0]) == ""
    padded_by_end = [TOKENIZER.bos, 320, 2368] + [TOKENIZER.eos] * 74
    assert TOKENIZER.decode(padded_by_end) == "a cat"
    with pytest.raises(ValueError, match="row: expected ids from 0 to 49407, got 49408"):
        TOKENIZER.decode([49408])
    with pytest.raises(ValueError, match=r"row: expected \[L\], got \(1, 77\)"):
        TOKENIZER.decode(TOKENIZER.encode("a"))


def test_wrong_arguments():
    with pytest.raises(TypeError, match="captions: expected str, got int"):
        TOKENIZER.encode([3])
    with pytest.raises(ValueError, match='unknown: expected "error" or "token"'):
        TOKENIZER.encode("a", unknown="skip")
    with pytest.raises(ValueError, match="context_length: expected an int >= 3, got 2"):
        BPETokenizer(2)
    with pytest.raises(TypeError, match="merges: expected a sequence of pairs"):
        BPETokenizer(merges="a b")
    for merges in (["ab c"], ["a"], ["a b", "ab  c"]):
        with pytest.raises(ValueError, match="merges: expected pairs of symbols made before them"):
            BPETokenizer(merges=merges)


# ------------------------------------------------------------------------------------ a pipeline that uses it


def pipeline_with(tokenizer: BPETokenizer) -> DALLE2:
    """A tiny pipeline whose text towers have the ids of this tokenizer."""
    pipe = tiny_pipeline(own_text_encoder=False)
    sizes = dict(num_text_tokens=tokenizer.vocab_size, text_seq_len=tokenizer.context_length)
    prior = DiffusionPrior(pipe.prior.config["net"] | {"context_length": tokenizer.context_length},
                           image_embed_dim=16)  # fmt: skip
    sampling = dict(steps=1, prior_steps=1, upsampler_steps=1)
    clip = CLIP(**pipe.clip.config | sizes)
    return DALLE2(clip, prior, pipe.decoder, pipe.upsampler, tokenizer, sampling=sampling)


def test_the_command_line(tmp_path, capsys):
    """generate, info and vocabulary with a checkpoint whose tokenizer reads any text."""
    checkpoint = str(pipeline_with(BPETokenizer(9, ["r e", "re d</w>"])).save_pretrained(tmp_path / "all"))
    again = load_on_cpu(checkpoint)
    assert again.tokenizer == BPETokenizer(9, ["r e", "re d</w>"])
    assert cli.main(["vocabulary", "--checkpoint", checkpoint]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Any text") and "516 kinds" in said and "at most 7" in said
    assert cli.main(["info", "--checkpoint", checkpoint]) == 0
    picture = tmp_path / "picture.png"
    options = ["--checkpoint", checkpoint, "--output", str(picture), "--num-images", "1", "--quiet",
               "--device", "cpu"]  # fmt: skip
    assert cli.main(["generate", "é 🙂", *options]) == 0
    assert picture.is_file()
    capsys.readouterr()
    assert cli.main(["generate", "far too long a caption", *options]) == 2
    assert "the caption has 18 tokens: expected at most 7" in capsys.readouterr().err


def test_training_on_own_data_with_it(tmp_path, capsys):
    """`train clip --tokenizer clip`: the run keeps it, its CLIP has its size, and another one is refused."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for index, caption in enumerate(["a harbour 🙂", "stop!!!", "漢字", "two dogs"]):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (60 * index, 90, 200)).save(picture, format="PNG")
            for ending, data in (("png", picture.getvalue()), ("txt", caption.encode())):
                entry = tarfile.TarInfo(f"{index}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    train = ["train", "clip", "--preset", "tiny", "--steps", "1", "--quiet", "--device", "cpu"]
    out, data = ["--out", str(tmp_path / "run")], ["--data", str(tmp_path / "data.tar")]
    assert cli.main([*train, *out, "--tokenizer", "clip"]) == 2
    assert "--tokenizer: clip is for captions from --data, expected --data" in capsys.readouterr().err
    assert cli.main([*train, *out, *data, "--tokenizer", "clip"]) == 0
    kept = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    assert tokenizer_from_config(kept) == TOKENIZER
    clip = CLIP.from_pretrained(tmp_path / "run" / "clip")
    assert (clip.num_tokens, clip.context_length) == (49408, 77)
    train[1] = "prior"
    assert cli.main([*train, *out, *data, "--tokenizer", "words"]) == 2
    assert "--tokenizer: the run in" in capsys.readouterr().err
    assert cli.main([*train, *out, *data]) == 0, "the one that the run has"


# --------------------------------------------------------------------------------- configurations and folders


def test_rebuilt_from_their_configuration():
    small = BPETokenizer(9, ["r e", "re d</w>"])
    assert small.vocab_size == 516 and small.tokenize("red bed") == [513, *small.tokenize("bed")]
    for tokenizer in (TOKENIZER, BPETokenizer(20), small, WordTokenizer(["a", "b"], 5)):
        config = json.loads(json.dumps(tokenizer.to_config()))
        again = tokenizer_from_config(config)
        assert again == tokenizer and type(again) is type(tokenizer)
    assert len(json.dumps(TOKENIZER.to_config())) < 100, "OpenAI's merges are not repeated in a checkpoint"
    assert pickle.loads(pickle.dumps(small)) == small, "workers that read data get a copy"
    with pytest.raises(ValueError, match="tokenizer: expected kind"):
        tokenizer_from_config({"kind": "sentencepiece"})
    with pytest.raises(ValueError, match="tokenizer: expected kind"):
        BPETokenizer.from_config({"kind": "bpe", "words": []})


def folder_of_hugging_face(path: Path, merges: list[str], style: str) -> Path:
    letters = list(byte_letters().values())
    names = [*letters, *(letter + "</w>" for letter in letters)]
    names += [merge.replace(" ", "") for merge in merges]
    vocabulary = {name: index for index, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    path.mkdir(exist_ok=True)
    if style == "merges.txt":
        (path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    else:
        pairs = [merge.split() for merge in merges] if style == "pairs" else merges
        model = {"type": "BPE", "vocab": vocabulary, "merges": pairs}
        (path / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    return path


@pytest.mark.parametrize("style", ["merges.txt", "pairs", "strings"])
def test_folders_of_hugging_face(tmp_path, style):
    merges = ["r e", "re d</w>", "Ġ Ģ"]
    folder = folder_of_hugging_face(tmp_path, merges, style)
    assert BPETokenizer.from_folder(folder, 9) == BPETokenizer(9, merges)


def test_the_published_folder_is_openai_s(tmp_path):
    folder = folder_of_hugging_face(tmp_path, list(clip_merges()), "merges.txt")
    assert BPETokenizer.from_folder(folder).to_config()["merges"] is None


def test_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json, or merges.txt and vocab.json"):
        BPETokenizer.from_folder(tmp_path)
    folder = folder_of_hugging_face(tmp_path, ["r e", "re d</w>"], "merges.txt")
    (folder / "merges.txt").write_text("#version: 0.2\nre d</w>\nr e\n")
    with pytest.raises(ValueError, match="merges.txt: not a tokenizer of CLIP's kind .*made before them"):
        BPETokenizer.from_folder(folder)
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nr a\n")
    with pytest.raises(ValueError, match="the id of 'ra': expected 513, got None"):
        BPETokenizer.from_folder(folder)
    for text in ("{", "[]", '{"model": {"vocab": []}}'):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="tokenizer.json: not a "):
            BPETokenizer.from_folder(folder)


def test_hugging_face_writes_such_folders(tmp_path):
    """What transformers saves is read; the ids agree where its simpler cleaning does."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    merges = ["r e", "re d</w>", "r i", "n g</w>", "ri ng</w>"]
    folder = folder_of_hugging_face(tmp_path / "in", merges, "merges.txt")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "out")
    tokenizer = BPETokenizer.from_folder(tmp_path / "out", 20)
    assert tokenizer == BPETokenizer(20, merges)
    for text in ("a red ring", "Red, 12 RINGS!", ""):
        assert theirs(text)["input_ids"] == [tokenizer.bos, *tokenizer.tokenize(text), tokenizer.eos]


def test_importing_the_data_needs_no_text_library():
    """ftfy and regex are imported for the first caption, not by everything that needs a stream of scenes."""
    import subprocess

    code = "import sys, dalle2_fast.data; print({'ftfy', 'regex'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parents[2])
    assert done.stdout.strip() == "set()", done.stderr


def test_clean():
    assert clean(" It\u2019s\n a  CAFÃ©&amp;amp; ") == "it's a café&"
