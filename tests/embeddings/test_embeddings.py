"""`dalle2-fast embed` and training on what it has written."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from dalle2_fast import CLIP
from dalle2_fast.cli import main
from dalle2_fast.data import PairStream
from dalle2_fast.data.sources.tars import TarShards
from dalle2_fast.embeddings.compute import Embedder
from dalle2_fast.embeddings.folder import EmbeddingFolder
from dalle2_fast.training.stages.registry import load_stage
from tests.data.pairs.making import caption, picture, write_tar

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::dalle2_fast.data.stream.SkippedSample")

BROKEN = {3, 11}  # samples whose image cannot be decoded
SIZES = (9, 8, 7)  # samples of each shard


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_data(folder):
    folder.mkdir()
    numbers = iter(range(sum(SIZES)))
    for shard, size in enumerate(SIZES):
        files = []
        for number in (next(numbers) for _ in range(size)):
            image = b"no image" if number in BROKEN else picture(number, 16)
            files += [(f"{number:05d}.png", image), (f"{number:05d}.txt", caption(number).encode())]
        write_tar(folder / f"{shard}.tar", files)
    return folder


def train(stage, out, data, *more):
    options = ["--preset", "tiny", "--steps", "3", "--batch-size", "4", "--device", "cpu", "--dtype", "fp32"]
    words = ["train", stage, *options, "--workers", "0", "--report-to", "none", "--quiet"]
    return main([*words, "--out", str(out), "--data", str(data), *map(str, more)])


def embed(data, out, run, *more):
    words = ["embed", str(data), str(out), "--device", "cpu", "--batch-size", "4", "--quiet"]
    return main([*words, "--checkpoint", str(run), *map(str, more)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, a run with a CLIP trained on them, and their embeddings in float32 and float16."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        data = write_data(root / "data")
        assert train("clip", root / "run", data) == 0
        assert embed(data, root / "float16", root / "run") == 0
        assert embed(data, root / "float32", root / "run", "--dtype", "float32") == 0
    return root


def column(folder, part, name):
    return parquet.read_table(folder / "metadata" / f"metadata_{part}.parquet").column(name).to_pylist()


def test_the_files_are_those_of_clip_retrieval(made):
    """Catches: rows in another order, embeddings that are not of unit norm, and names that do not sort."""
    clip, tokenizer = load_stage(made / "run", "clip"), PairStream(made / "data", 1).tokenizer
    folder, number = made / "float32", 0
    for part, size in enumerate(SIZES):
        numbers = [each for each in range(number, number + size) if each not in BROKEN]
        assert column(folder, part, "image_path") == [f"{each:05d}" for each in numbers]
        assert column(folder, part, "caption") == [caption(each) for each in numbers]
        assert column(folder, part, "row") == [each - number for each in numbers]
        tokens = tokenizer.encode([caption(each) for each in numbers], unknown="token", truncate=True)
        text = np.load(folder / "text_emb" / f"text_emb_{part}.npy")
        assert np.allclose(text, clip.encode_text(tokens)[0].numpy(), atol=1e-5)
        image = np.load(folder / "img_emb" / f"img_emb_{part}.npy")
        assert image.dtype == np.float32 and np.allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)
        stored = np.load(made / "float16" / "img_emb" / f"img_emb_{part}.npy")
        assert stored.dtype == np.float16 and np.allclose(stored, image, atol=1e-3)
        number += size


@pytest.mark.parametrize("stage", ["prior", "prior autoregressive", "decoder"])
def test_the_losses_are_those_without_embeddings(made, tmp_path, stage):
    """Catches: embeddings of another sample, also where a broken image is replaced by another sample."""
    name, *kind = stage.split()
    more = ["--prior", kind[0]] if kind else []
    losses = {}
    for source in ("none", "float32", "float16"):
        out = tmp_path / source
        out.mkdir()
        shutil.copytree(made / "run" / "clip", out / "clip")
        shutil.copy(made / "run" / "tokenizer.json", out)
        given = [] if source == "none" else ["--embeddings", made / source]
        assert train(name, out, made / "data", *more, *given) == 0
        rows = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        losses[source] = [(row["loss"], row["grad_norm"]) for row in rows]
    assert losses["none"] and len(set(losses["none"])) == len(losses["none"])
    assert np.allclose(losses["float32"], losses["none"], rtol=1e-4, atol=1e-6)
    # A bucket of the autoregressive prior may change where a value is close to its edge.
    assert np.allclose(losses["float16"], losses["none"], rtol=0.02 if kind else 2e-3, atol=1e-6)


def test_the_prior_reads_no_image(made, monkeypatch):
    """Catches: a prior at the speed of decoding, and a decoder that also makes images for CLIP."""
    asked = []
    inner = TarShards.read

    def read(self, shard, row, *, image=True):
        asked.append(image)
        return inner(self, shard, row, image=image)

    monkeypatch.setattr(TarShards, "read", read)
    folder = EmbeddingFolder(made / "float16")
    stream = PairStream(made / "data", 6, (), embeddings=folder)
    asked.clear()
    batch = stream.batch(0)
    assert asked and not any(asked) and batch["images"] == {}
    assert batch["image_embed"].shape == (6, folder.width) and batch["image_embed"].dtype == torch.float32
    plain = PairStream(made / "data", 6, (8,)).batch(0)
    assert batch["captions"] == plain["captions"]
    ahead = PairStream(made / "data", 6, (), embeddings=folder, workers=1)
    try:
        assert torch.equal(ahead.batch(0)["image_embed"], batch["image_embed"])
    finally:
        ahead.close()
    shards = TarShards([str(path) for path in sorted((made / "data").iterdir())])
    again = pickle.loads(pickle.dumps(folder.attached_to(shards, images=False)))
    assert again.read(1, 0).key == "00009" and again.read(1, 0).embed.shape == (folder.width,)


def test_a_killed_run_goes_on(made, tmp_path, monkeypatch):
    """Catches: parts that are computed twice, and half of a part that passes for a whole one."""
    out, inner, done = tmp_path / "out", Embedder.shard, []

    def shard(self, source, number, progress):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(number)
        return inner(self, source, number, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "shard", shard)
        assert embed(made / "data", out, made / "run") == 130
    (out / "metadata" / "metadata_1.parquet.partial").touch()
    with pytest.raises(ValueError, match="2 of 3 parts are missing, the first is .*metadata_1.parquet"):
        EmbeddingFolder(out)
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with monkeypatch.context() as patch:
            patch.setattr(Embedder, "shard", lambda *given: done.append(given[2]) or inner(*given))
            assert embed(made / "data", out, made / "run") == 0
    assert done == [0, 1, 2]
    for kind in ("img_emb", "text_emb"):
        for path in (made / "float16" / kind).iterdir():
            assert (out / kind / path.name).read_bytes() == path.read_bytes()


def test_what_does_not_fit_is_one_line(made, tmp_path, capsys):
    """Catches: training on the embeddings of other images or of another CLIP."""

    def refused(message, *arguments):
        assert train(*arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err

    run, data = made / "run", made / "data"
    given = ["--embeddings", made / "float16"]
    refused("--embeddings: is for prior and decoder, got clip", "clip", tmp_path / "a", data, *given)
    refused("embeddings.json not found: first run", "prior", run, data, "--embeddings", data)

    # Another CLIP of the same sizes.
    assert train("clip", tmp_path / "other", data, "--seed", 5) == 0
    refused("was computed by another CLIP", "prior", tmp_path / "other", data, *given)

    # Other data, a damaged file, a damaged record.
    broken = tmp_path / "broken"
    shutil.copytree(made / "float16", broken)
    given = ["--embeddings", broken]
    path = broken / "img_emb" / "img_emb_1.npy"
    np.save(path, np.load(path)[:-1])
    refused("expected 7 rows of width", "prior", run, data, *given)
    record = json.loads((broken / "embeddings.json").read_text())
    for change, message in (
        ({"samples": [9, 8, 6]}, "is of 2.tar with 6 samples, got 2.tar with 7"),
        ({"names": ["0.tar"], "samples": [9]}, "has 1 parts, got data of 3 shards"),
        ({"width": 5}, "has embeddings of width 5, got"),
        ({"format_version": 9}, "expected format_version 1, got 9"),
    ):
        (broken / "embeddings.json").write_text(json.dumps(record | change))
        refused(message, "prior", run, data, *given)
    assert embed(data, made / "float16", run, "--dtype", "float32") == 2
    assert "dtype: the folder has float16, got float32" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_embeddings(made, tmp_path, capsys):
    """Catches: a paused run that goes on with CLIP or with other embeddings, and ends elsewhere."""
    given = ["--embeddings", made / "float16"]
    ended = {}
    for name, pauses in (("whole", False), ("paused", True)):
        out = tmp_path / name
        out.mkdir()
        shutil.copytree(made / "run" / "clip", out / "clip")
        shutil.copy(made / "run" / "tokenizer.json", out)
        assert train("prior", out, made / "data", *given, *(["--pause-after", 0] if pauses else [])) == 0
        if pauses:
            other = ["--resume", "--embeddings", made / "float32"]
            assert train("prior", out, made / "data", *other) == 2
            assert "--embeddings: the run has" in capsys.readouterr().err
            assert train("prior", out, made / "data", "--resume") == 0
        ended[name] = load_stage(out, "prior").state_dict()
    assert all(torch.equal(value, ended["paused"][name]) for name, value in ended["whole"].items())


def test_a_changed_shard_is_noticed(made, tmp_path):
    """Catches: embeddings of other images after a shard was written anew with as many samples."""
    data = shutil.copytree(made / "data", tmp_path / "data")
    files = []
    for number in range(100, 100 + SIZES[0]):
        files += [(f"{number:05d}.png", picture(number, 16)), (f"{number:05d}.txt", b"another")]
    write_tar(data / "0.tar", files)
    stream = PairStream(data, 24, (), embeddings=EmbeddingFolder(made / "float16"))
    with pytest.raises(ValueError, match="0.tar has changed since it was embedded: sample . was 0"):
        stream.batch(0)


def test_a_clip_alone_and_wrong_ones(made, tmp_path, capsys):
    """Catches: a published CLIP that is read with the tokens of another vocabulary."""
    sizes = dict(dim_text=64, dim_image=64, dim_latent=8, text_enc_depth=1, text_heads=1, visual_enc_depth=1,
                 visual_heads=1, visual_image_size=16, visual_patch_size=8, text_seq_len=12)  # fmt: skip
    CLIP(**sizes).save_pretrained(tmp_path / "clip")
    words = ["embed", str(made / "data"), str(tmp_path / "out"), "--device", "cpu", "--quiet"]
    capsys.readouterr()
    assert main([*words, "--clip", str(tmp_path / "clip"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert EmbeddingFolder(tmp_path / "out").width == facts["width"] == 8
    assert facts["samples"] == sum(SIZES) - len(BROKEN) and facts["parts_made"] == len(SIZES)
    CLIP(**sizes, num_text_tokens=9).save_pretrained(tmp_path / "words")
    capsys.readouterr()
    for name, message in (("words", "expected a vocabulary of 49,408"), ("none", "none: no such")):
        assert main([*words[:2], str(tmp_path / "new"), *words[3:], "--clip", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and (message in err or name == "none")
        assert not (tmp_path / "new").exists()
