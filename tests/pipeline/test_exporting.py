"""Exported networks: files that compute what the networks compute for any number of rows, and their index."""

from __future__ import annotations

import importlib.util
import json
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from benchmarks.cases.sizes import fill_zeros
from dalle2_fast import CLIP, DALLE2, ARPrior, Decoder, DiffusionPrior, Upsampler, cli
from dalle2_fast.data.text.tokenizer import WordTokenizer
from dalle2_fast.diffusion import GaussianDiffusion
from dalle2_fast.functional import sample_noise
from dalle2_fast.pipeline.exporting import FORMATS, export, runtimes
from dalle2_fast.pipeline.exporting.export import export_networks
from dalle2_fast.training.distillation.student import make_student

WORDS = ("a", "red", "ring")
PREDICTION, EMBEDDING = ["prediction"], ["image_embed"]
OUTPUTS = {
    "clip_text": ["text_embed", "text_encodings", "text_mask"],
    "clip_image": EMBEDDING,
    "prior": PREDICTION,
    "prior_embedding": EMBEDDING,
    "decoder_condition": ["context", "context_mask", "classes"],
    "decoder": PREDICTION,
    "upsampler": PREDICTION,
}


def smallest_pipeline(prior: str = "diffusion", text_encoder: bool = False, **upsamplers) -> DALLE2:
    """One block of everything, no layer of zeros; `upsamplers` are options of the upsamplers."""
    tokenizer = WordTokenizer(WORDS, context_length=5)
    text = dict(context_length=5, dim=8, depth=1, heads=2)
    unet = dict(out_channels=3, channels=(8,), layers_per_block=1, num_groups=2)
    latent = dict(image_embed_dim=6, text_embed_dim=6, text_encoding_dim=8)
    ids = dict(num_tokens=tokenizer.vocab_size)
    if text_encoder:
        latent |= dict(text_embed_dim=8, text_encoder=text | ids)

    def upsampler(size, last_unet=False, **options):
        net = dict(in_channels=6, attention_levels=(), cross_dim=None, **unet)
        net |= dict(class_embed_dim=4) if "max_noise_level" in options else {}
        return Upsampler(net, image_size=2 * size, low_res_size=size, last_unet=net if last_unet else None,
                         **options)  # fmt: skip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = dict(dim=8, depth=1, heads=2, dim_head=4, embed_dim=6, text_dim=8, context_length=5)
        if prior == "diffusion":
            made = DiffusionPrior(net)
            made.fit_statistics(torch.randn(9, 6))
        else:
            made = ARPrior(net | dict(num_components=3, num_buckets=4, num_dot_buckets=2))
            made.fit(torch.randn(9, 6), torch.randn(9, 6))
        clip = CLIP(dim_text=8, dim_image=8, dim_latent=6, num_text_tokens=tokenizer.vocab_size,
                    text_enc_depth=1, text_seq_len=5, text_heads=2, visual_enc_depth=1, visual_heads=2,
                    visual_image_size=4, visual_patch_size=2)  # fmt: skip
        decoder = Decoder(dict(in_channels=3, attention_levels=(0,), head_dim=4, cross_dim=6, **unet),
                          image_size=4, num_image_tokens=2, variance="fixed_small",
                          prediction="v_prediction", schedule="continuous_cosine", timesteps=None,
                          **latent)  # fmt: skip
        pipe = DALLE2(clip, made, decoder, upsampler(4, **upsamplers), tokenizer,
                      upsampler2=upsampler(8, **upsamplers) if upsamplers else None,
                      sampling=dict(steps=4, guidance=1.0))  # fmt: skip
        fill_zeros(pipe)
    return pipe.eval()


class Torch:
    """torch's own exported programs as a format: what no package is needed for.

    Exporting a network takes seconds. A test that is about some of them names these; the others are kept as
    they are, next to an empty file.
    """

    packages, suffix = (), ".pt2"

    def __init__(self, names=None):
        self.names, self.kept = names, {}

    def write(self, module, inputs, outputs, path):
        if self.names is None or path.stem in self.names:
            torch.export.save(runtimes._program(module, inputs), path)
        else:
            self.kept[path.stem] = module
            path.touch()

    def run(self, path, inputs):
        program = self.kept.get(path.stem) or torch.export.load(path).module()
        with torch.no_grad():
            found = program(**inputs)
        return [found] if isinstance(found, torch.Tensor) else list(found)


@contextmanager
def torch_alone(*names):
    """The format in which only these networks are exported."""
    with mock.patch.dict(runtimes.RUNTIMES, {"torch": Torch(names)}):
        yield "torch"


@pytest.fixture(scope="module")
def torch_format():
    with mock.patch.dict(runtimes.RUNTIMES, {"torch": Torch()}):
        yield "torch"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, torch_format):
    """The folder of a whole pipeline."""
    folder = tmp_path_factory.mktemp("exported")
    assert max(dict(export_networks(smallest_pipeline(), folder, torch_format)).values()) < 1e-5
    return folder


def read_index(folder) -> dict:
    return json.loads((folder / export.INDEX).read_text())


def test_the_index_names_files_inputs_and_steps(exported):
    """Catches: a network, a file or an input that is left out, steps of another setting."""
    index = read_index(exported)
    networks = index["networks"]
    assert {name: list(about["outputs"]) for name, about in networks.items()} == OUTPUTS
    assert all((exported / about["file"]).is_file() for about in networks.values())
    assert networks["decoder"]["inputs"] == {
        "x": {"dtype": "float32", "shape": ["batch", 3, 4, 4]},
        "time": {"dtype": "float32", "shape": ["batch"]},
        "context": {"dtype": "float32", "shape": ["batch", 7, 6]},
        "context_mask": {"dtype": "bool", "shape": ["batch", 7]},
        "classes": {"dtype": "float32", "shape": ["batch", 32]},
    }
    assert networks["clip_text"]["inputs"] == {"tokens": {"dtype": "int64", "shape": ["batch", 5]}}
    steps = {name: len(about["table"]) for name, about in index["diffusions"].items()}
    assert steps == {"decoder": 4, "prior": 25, "upsampler": 10}


def test_networks_that_take_guidance_as_an_input(tmp_path):
    """Catches: a distilled network whose files ignore the guidance weight."""
    pipe = smallest_pipeline()
    prior, decoder = (make_student(each, 2, (1.0, 4.0)) for each in (pipe.prior, pipe.decoder))
    sampling = dict(steps=2, prior_steps=2, sampler="consistency", upsampler_sampler="ddim")
    pipe = DALLE2(pipe.clip, prior, decoder, pipe.upsampler, pipe.tokenizer, sampling=sampling)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fill_zeros(pipe)
    with torch_alone("prior", "decoder_condition") as format:
        assert max(dict(export_networks(pipe.eval(), tmp_path / "new", format)).values()) < 1e-5
    index = read_index(tmp_path / "new")
    for name in ("prior", "decoder_condition"):
        described = index["networks"][name]["inputs"]["guidance"]
        assert described == {"dtype": "float32", "shape": ["batch"]}

    def classes(weight):
        _, _, found = Torch().run(tmp_path / "new" / "decoder_condition.pt2", inputs | {"guidance": weight})
        return found

    text = pipe.clip.encode_text(pipe.tokenizer.encode(["a red ring"]), normalize=decoder.unit_norm)
    inputs = dict(zip(OUTPUTS["clip_text"], text, strict=True))
    keep = torch.tensor([True])
    inputs |= dict(image_embed=torch.zeros(1, 6), keep_image=keep, keep_text=keep)
    assert not torch.equal(classes(torch.tensor([1.0])), classes(torch.tensor([4.0])))
    steps = index["diffusions"]["decoder"]
    assert (steps["sampler"], len(steps["times"])) == ("consistency", 2)


def test_the_index_says_how_x0_follows_from_a_preconditioned_network(tmp_path):
    """Catches: an index of an "edm" network from which no sampler can be written."""
    pipe = smallest_pipeline()
    pipe.decoder.diffusion = GaussianDiffusion(
        pipe.decoder.diffusion.schedule, prediction="edm", sigma_data=0.5, variance="fixed_small"
    )
    with torch_alone() as format:
        list(export_networks(pipe, tmp_path / "new", format))
    steps = read_index(tmp_path / "new")["diffusions"]["decoder"]
    alpha, sigma = torch.tensor(steps["table"], dtype=torch.float64)[:, :2].T
    variance = sigma**2 + 0.25 * alpha**2
    torch.testing.assert_close(torch.tensor(steps["scale"], dtype=torch.float64), variance.rsqrt())
    torch.testing.assert_close(torch.tensor(steps["skip"], dtype=torch.float64), 0.25 * alpha / variance)
    gain = torch.tensor(steps["gain"], dtype=torch.float64)
    torch.testing.assert_close(gain, 0.5 * sigma * variance.rsqrt())


def test_what_the_package_does_not_ship_is_exported_too(tmp_path):
    """Catches: an autoregressive prior, a second upsampler, a last step or a noise level that is left out."""
    options = dict(prior="autoregressive", text_encoder=True, max_noise_level=0.5, last_unet=True)
    pipe = smallest_pipeline(**options)
    state = torch.get_rng_state()
    others = ("upsampler_last", "upsampler2", "upsampler2_last")
    with torch_alone("prior", "decoder_condition", *others) as format:
        differences = dict(export_networks(pipe, tmp_path / "new", format))
    assert torch.equal(torch.get_rng_state(), state) and max(differences.values()) < 1e-5
    index = read_index(tmp_path / "new")
    assert index["networks"].keys() == OUTPUTS.keys() | set(others)
    assert list(index["networks"]["prior"]["outputs"]) == ["logits"]
    assert "tokens" in index["networks"]["decoder_condition"]["inputs"]
    assert "noise_level" in index["networks"]["upsampler2_last"]["inputs"]
    assert index["diffusions"].keys() == {"decoder", "upsampler", "upsampler2"}


def test_the_files_and_the_index_suffice_to_sample(exported):
    """Catches: times or coefficients of another step, a condition that the index does not name."""
    pipe, index = smallest_pipeline(), read_index(exported)

    def run(name, **inputs):
        return Torch().run(exported / index["networks"][name]["file"], inputs)

    tokens = pipe.tokenizer.encode(["a red ring"])
    keep = torch.tensor([True])
    text = dict(zip(OUTPUTS["clip_text"], run("clip_text", tokens=tokens), strict=True))
    image_embed = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    conditions = run("decoder_condition", image_embed=image_embed, keep_image=keep, keep_text=keep, **text)
    conditions = dict(zip(OUTPUTS["decoder_condition"], conditions, strict=True))
    x = sample_noise(torch.tensor([7]), 0, (1, 3, 4, 4))
    options = dict(seeds=torch.tensor([0]), x_T=x, steps=4, sampler="dpm++")
    expected = pipe.decoder.sample(image_embed, **text, **options)
    diffusion, previous = index["diffusions"]["decoder"], torch.zeros(())
    assert diffusion["prediction"] == "v_prediction" and diffusion["sampler"] == "dpm++"
    for time, row in zip(diffusion["times"], diffusion["table"], strict=True):
        step = dict(zip(diffusion["columns"], row, strict=True))
        (v,) = run("decoder", x=x, time=torch.tensor([time]), **conditions)
        x0 = (step["alpha"] * x - step["sigma"] * v).clamp(-1, 1)
        x, previous = step["a"] * x + step["b"] * x0 + step["c"] * previous, x0
    torch.testing.assert_close((x + 1) / 2, expected, rtol=0, atol=1e-5)


def test_a_file_that_computes_something_else_is_refused(tmp_path, torch_format, monkeypatch):
    """Catches: an export that is called complete and is wrong."""
    run = Torch.run
    monkeypatch.setattr(Torch, "run", lambda *args: [value + 0.01 for value in run(*args)])
    with pytest.raises(RuntimeError, match="clip_text: text_embed differs by 0.01 from the network's"):
        list(export_networks(smallest_pipeline(), tmp_path / "new", torch_format))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_formats(tmp_path, capsys, format):
    """Catches: an operation that the format does not have, or computes otherwise."""
    for package in runtimes.RUNTIMES[format].packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    checkpoint = smallest_pipeline().save_pretrained(tmp_path / "checkpoint")
    words = ["export", str(tmp_path / "new"), "--format", format, "--checkpoint", str(checkpoint)]
    assert cli.main(words) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(OUTPUTS)
    assert all(float(line.split()[-1]) < 1e-5 for line in lines) and str(tmp_path / "new") in last
    assert cli.main(words) == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("format", FORMATS)
def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys, format):
    """Catches: an ImportError of another project after the weights were read."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["export", str(tmp_path / "new"), "--format", format, "--checkpoint", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert f"{format} needs {', '.join(runtimes.RUNTIMES[format].packages)}: pip install" in err
    assert err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_refused(tmp_path, torch_format, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(tmp_path / "new"), "--format", "tflite"])
    assert end.value.code == 2 and "tflite" in capsys.readouterr().err
    with pytest.raises(ValueError, match="format: expected onnx or openvino or torch, got 'tflite'"):
        export_networks(smallest_pipeline(), tmp_path / "new", "tflite")
    with pytest.raises(ValueError, match="expected float32 on the CPU, got torch.bfloat16 on cpu"):
        export_networks(smallest_pipeline().bfloat16(), tmp_path / "new", torch_format)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected a new or an empty folder"):
        export_networks(smallest_pipeline(), tmp_path / "file", torch_format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
