"""`dalle2-fast generate` on a tiny random pipeline: files and their text chunks, printed lines, refusals."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dalle2_fast import DALLE2, cli
from dalle2_fast.ops import _build_info, _native
from tests.support.tiny_pipeline import load_on_cpu, tiny_pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_pipeline().save_pretrained(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def generate(checkpoint, tmp_path, monkeypatch, capsys):
    """generate(*arguments) -> exit code, printed lines as a dict, stderr; in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments, caption="a red ring"):
        code = cli.main(["generate", caption, "--checkpoint", str(checkpoint), "--device", "cpu", *arguments])
        out, err = capsys.readouterr()
        return code, dict(line.split(":", 1) for line in out.splitlines()), err

    return run


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_defaults(generate):
    code, printed, err = generate()
    assert code == 0
    assert os.listdir() == ["outputs"]
    (name,) = os.listdir("outputs")
    seed = int(printed["seed"])
    assert name == f"a-red-ring-{seed}.png"
    name = f"outputs/{name}"
    assert printed["image"].strip() == f"{os.path.abspath(name)} (4 of 32 x 32)"
    assert "cpu" in printed["device"]
    native = _native.WHY_ABSENT is None
    assert printed["backend"].strip().startswith("fused (group_norm_silu" if native else "reference (plain")
    for stage in ("start-up", "text", "prior", "decoder", "upsampler", "in all"):
        assert re.search(rf"{stage} \d+\.\d\d", printed["seconds"])
    for stage in ("text", "prior", "decoder", "upsampler"):
        assert f"{stage}: 100%" in err
    with Image.open(name) as picture:
        assert picture.format == "PNG" and picture.size == (68, 68)  # 2 x 2 of 32 with a gap of 4
        assert picture.text["caption"] == "a red ring" and int(picture.text["seed"]) == seed
        assert json.loads(picture.text["settings"])["sampler"] == "dpm++"


def test_seed(generate):
    generate("--seed", "5", "--output", "one.png", "--quiet")
    generate("--seed", "5", "--output", "two.png", "--quiet")
    generate("--seed", "6", "--output", "three.png", "--quiet")
    assert (pixels("one.png") == pixels("two.png")).all()
    assert (pixels("one.png") != pixels("three.png")).any()


def test_without_a_seed_each_run_differs(generate):
    assert generate("--quiet")[1]["seed"] != generate("--quiet")[1]["seed"]


def test_options_arrive(generate, monkeypatch):
    seen = {}
    inner = DALLE2.generate

    def spy(self, prompt, num_images, **options):
        seen.update(options, prompt=prompt, num_images=num_images)
        return inner(self, prompt, num_images, **options)

    monkeypatch.setattr(DALLE2, "generate", spy)
    code, _, err = generate(
        "--num-images",
        "3",
        "--seed",
        "1",
        "--steps",
        "3",
        "--guidance",
        "1.5",
        "--prior-steps",
        "4",
        "--prior-guidance",
        "2.5",
        "--guidance-interval",
        "-4.5",
        "100",
        "--size",
        "16",
        "--sampler",
        "ddim",
        "--negative",
        "a blue ring",
        "--prior-sampler",
        "ddpm",
        "--spacing",
        "log_snr",
        "--dtype",
        "fp32",
        "--batch-size",
        "2",
        "--output",
        "x.png",
        "--quiet",
    )
    assert code == 0 and err == ""
    assert seen == dict(
        prompt="a red ring",
        num_images=3,
        seed=1,
        steps=3,
        guidance=1.5,
        candidates=None,
        prior_steps=4,
        prior_guidance=2.5,
        guidance_interval=[-4.5, 100.0],
        prior_guidance_interval=None,
        prior_candidates=None,
        negative_prompt="a blue ring",
        upsampler_steps=None,
        upsampler2_steps=None,
        size=16,
        tile=None,
        sampler="ddim",
        prior_sampler="ddpm",
        upsampler_sampler=None,
        upsampler2_sampler=None,
        spacing="log_snr",
        batch_size=2,
        progress=False,
        graphs="auto",
    )
    with Image.open("x.png") as picture:
        assert picture.size == (36, 36)
        settings = json.loads(picture.text["settings"])
    assert settings | {"steps": 3, "prior_guidance": 2.5, "sampler": "ddim", "dtype": "float32"} == settings


def test_individual(generate, checkpoint):
    _, printed, _ = generate(
        "--num-images", "2", "--seed", "3", "--individual", "deep/each", "--output", "g.png"
    )
    assert printed["individual"].strip() == os.path.abspath("deep/each")
    assert sorted(os.listdir("deep/each")) == ["000.png", "001.png"]
    (expected,) = load_on_cpu(checkpoint)("a red ring", 1, seed=3, output_type="pil")
    difference = pixels("deep/each/000.png") - np.asarray(expected)
    assert abs(difference).max() <= 1  # a batch of 2 and of 1 round differently
    with Image.open("deep/each/000.png") as picture:
        assert picture.text["index"] == "0" and picture.text["seed"] == "3"


def test_output_in_a_new_folder(generate):
    assert generate("--num-images", "1", "--size", "16", "--output", "new/folder/x.PNG")[0] == 0
    with Image.open("new/folder/x.PNG") as picture:
        assert picture.size == (16, 16)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "100"], "size: expected one of 16, 32, got 100"),
        (["--output", "x.gif"], "--output: expected a name that ends in .png, .jpg, .jpeg, .webp, got 'x."),
        (["--quality", "50"], "--quality: is for .jpg and .webp, got 50 for a-red-ring-"),
        (["--negative", "a red zebra"], '--negative: unknown word "zebra"'),
        (["--guidance-interval", "3", "1"], "guidance_interval: expected finite numbers (low, high)"),
        (["--output", "folder.png"], "--output: folder.png is a folder"),
        (["--output", "file/x.png"], "--output: file is not a folder"),
        (["--individual", "file"], "--individual: file is not a folder"),
        (["--checkpoint", "nowhere"], "nowhere: no such checkpoint folder"),
        (["--device", "abacus"], "--device: expected auto, cpu"),
    ],
)
def test_refused(generate, arguments, says):
    os.mkdir("folder.png")
    open("file", "w").close()
    code, printed, err = generate(*arguments)
    assert (code, printed) == (2, {})
    assert err.startswith("dalle2-fast: ") and says in err and err.count("\n") == 1
    assert sorted(os.listdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("caption", ["", "  ", "a red zebra", "a red ring a red ring a red ring"])
def test_refused_captions(generate, caption):
    code, _, err = generate(caption=caption)
    assert code == 2 and err.startswith("dalle2-fast: ") and err.count("\n") == 1 and os.listdir() == []
    assert "zebra" in err if "zebra" in caption else "caption" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num-images", "0"],
        ["--steps", "2.5"],
        ["--seed", "-1"],
        ["--guidance", "nan"],
        ["--guidance", "x"],
        ["--sampler", "euler"],
        ["--dtype", "int8"],
    ],
)
def test_refused_by_the_parser(generate, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        generate(*arguments)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert arguments[0] in err and arguments[1] in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(generate):
    os.mkdir("locked")
    os.chmod("locked", 0o500)
    code, _, err = generate("--output", "locked/x.png")
    assert code == 2 and "--output: no permission to write in locked" in err


def test_damaged_checkpoint(generate, checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "model.safetensors"):
        (damaged / name).write_bytes((checkpoint / name).read_bytes()[:2000])
    code, _, err = generate("--checkpoint", str(damaged))
    assert code == 2 and err.count("\n") == 1 and str(damaged) in err


def test_a_slower_dtype_is_said(generate, monkeypatch):
    monkeypatch.setattr(_build_info, "cpu_has_bfloat16_units", lambda: False)
    code, printed, err = generate("--dtype", "bf16", "--quiet", "--num-images", "1")
    assert code == 0 and "bfloat16" in printed["device"]
    assert err == "note: this CPU has no matrix units for bf16; fp32 is faster\n"


def test_an_interrupt_leaves_nothing(generate, monkeypatch):
    def interrupted(self, *args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    code, _, err = generate("--quiet")
    assert (code, err) == (130, "dalle2-fast: interrupted\n")
    assert not [name for _, _, names in os.walk(".") for name in names]


@pytest.mark.gpu
def test_on_the_gpu(generate, monkeypatch):
    code, printed, _ = generate("--device", "cuda", "--quiet")
    assert code == 0 and "cuda" in printed["device"] and torch.cuda.get_device_name() in printed["device"]
