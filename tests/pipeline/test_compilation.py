"""Compiled networks: their results are those of the networks, and a program is used where it fits."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import shutil

import pytest
import torch

from benchmarks.cases.sizes import fill_zeros
from dalle2_fast import DALLE2, UNet, cli
from dalle2_fast.pipeline.compilation import inductor, store
from dalle2_fast.pipeline.compilation import pipeline as compilation
from dalle2_fast.pipeline.compilation.network import CompiledNetwork
from dalle2_fast.pipeline.compilation.openvino import OpenVINO
from tests.support.tiny_pipeline import tiny_pipeline

FEW = dict(seed=0, steps=2, prior_steps=2, upsampler_steps=2)
CAPTION, LONGER = "a red ring", "a blue square above a ring"
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)


class Recorder:
    """A backend whose programs are the networks themselves; it counts how many are built and loaded."""

    name, has_weights = "recorder", False

    def __init__(self):
        self.built, self.loaded = [], 0

    def check(self, network):
        """It takes every network."""

    def facts(self):
        return {}

    def build(self, call, tensors, varying, folder):
        assert all(size > 1 for tensor, dims in zip(tensors, varying, strict=True)
                   for dim, size in enumerate(tensor.shape) if dim in dims)  # fmt: skip
        self.built.append(type(call.network).__name__)
        (folder / "program").touch()

    def load(self, call, folder):
        assert (folder / "program").exists()
        self.loaded += 1
        weights = copy.deepcopy(call.network.state_dict())

        def run(tensors):
            assert all(tensor.is_contiguous() for tensor in tensors)
            named = {f"network.{name}": weight for name, weight in weights.items()}
            return torch.func.functional_call(call, named, (tensors,))

        return run


def pipeline(dtype=torch.float32) -> DALLE2:
    """No layer of zeros, which would hide what the layers before it compute."""
    pipe = tiny_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fill_zeros(pipe)
    return pipe.to(dtype).eval()


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """recorded() -> a pipeline that a Recorder compiled, and this Recorder; all in one folder."""

    def compiled():
        recorder = Recorder()
        monkeypatch.setattr(compilation, "OpenVINO", lambda: recorder)
        return pipeline().compile("openvino", cache_dir=tmp_path), recorder

    return compiled


def test_a_program_serves_all_captions_and_numbers_of_images(recorded):
    """Catches: a program for each batch size or caption; wrong arguments of a program."""
    pipe, recorder = recorded()
    plain = pipeline()
    assert torch.equal(pipe(CAPTION, 2, candidates=2, **FEW), plain(CAPTION, 2, candidates=2, **FEW))
    networks = ["DiffusionPriorNetwork", "UNet", "UNet", "VisionTransformer"]
    assert sorted(recorder.built) == networks and recorder.loaded == 4
    for count, caption in ((1, CAPTION), (3, LONGER)):
        assert torch.equal(pipe(caption, count, **FEW), plain(caption, count, **FEW))
    assert recorder.loaded == 4
    again, another = recorded()  # as in a later process
    assert torch.equal(again(CAPTION, 1, **FEW), plain(CAPTION, 1, **FEW))
    assert another.built == [] and another.loaded == 3


def test_other_shapes_dtypes_and_threads_need_other_programs(recorded):
    """Catches: a program that runs on shapes, dtypes or threads it was not made for."""
    pipe, recorder = recorded()
    low_res = torch.rand(2, 3, 16, 16)
    seeds = torch.tensor([0, 1])
    for images in (low_res, torch.rand(2, 3, 8, 8)):
        pipe.upsampler.sample(images, seeds=seeds, steps=1)
    assert recorder.built == ["UNet", "UNet"]
    torch.set_num_threads(2)
    try:
        pipe.upsampler.sample(low_res, seeds=seeds, steps=1)
    finally:
        torch.set_num_threads(1)
    assert recorder.built == ["UNet", "UNet"] and recorder.loaded == 3  # inductor.facts has the threads
    expected = pipeline(torch.bfloat16).upsampler.sample(low_res, seeds=seeds, steps=1)
    assert torch.equal(pipe.bfloat16().upsampler.sample(low_res, seeds=seeds, steps=1), expected)
    assert len(recorder.built) == 3


@pytest.mark.parametrize("baked", [False, True])
def test_changed_weights_are_noticed(recorded, baked):
    """Catches: images of weights that were overwritten or replaced."""
    pipe, recorder = recorded()
    recorder.has_weights = baked
    for change in (lambda p: p.mul_(1.5), lambda p: setattr(p, "data", p.data + 0.1)):
        plain = pipeline()
        pipe(CAPTION, 1, **FEW)
        with torch.no_grad():
            for weight in (pipe.decoder.unet.conv_out.weight, plain.decoder.unet.conv_out.weight):
                weight.copy_(plain.decoder.unet.conv_out.weight)
                change(weight)
        assert torch.equal(pipe(CAPTION, 1, **FEW), plain(CAPTION, 1, **FEW))
    assert recorder.built.count("UNet") == (4 if baked else 2)


def test_gradients_are_those_of_the_network(recorded):
    """Catches: a program, which has no gradients, in a training step."""
    pipe, recorder = recorded()
    embed, image = torch.rand(2, 16), torch.rand(2, 3, 16, 16)
    text = pipe.tokenizer.encode([CAPTION, LONGER])
    for mode in (pipe.train, pipe.eval):
        mode()
        loss = pipe.decoder(image, text, embed, generator=torch.Generator().manual_seed(0))
        assert torch.autograd.grad(loss, pipe.decoder.unet.conv_out.weight)[0].any()
    assert recorder.built == []


def test_copies_pickles_and_checkpoints_stay_possible(recorded, tmp_path):
    """Catches: a compiled pipeline that cannot be saved, and a copy that runs its source's weights."""
    pipe, _ = recorded()
    before = pipe(CAPTION, 1, **FEW)
    assert pipe.state_dict().keys() == pipeline().state_dict().keys()
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipeline().compile(cache_dir=tmp_path)))):
        assert isinstance(other.decoder.unet.forward, CompiledNetwork)
        assert other.decoder.unet.forward.network is other.decoder.unet
    other = copy.deepcopy(pipe)
    torch.nn.init.zeros_(other.decoder.unet.conv_out.weight)
    assert not torch.equal(other(CAPTION, 1, **FEW), before) and torch.equal(pipe(CAPTION, 1, **FEW), before)
    pipe.compile("eager")
    assert not any("forward" in vars(module) or "denoise" in vars(module) for module in pipe.modules())


def sample_prior(pipe: DALLE2, rows: int, caption: str = CAPTION) -> torch.Tensor:
    """What one network samples; each takes seconds to compile, so no test compiles all of them."""
    text_embed, encodings, mask = pipe.clip.encode_text(pipe.tokenizer.encode([caption] * rows))
    return pipe.prior.sample(
        text_embed=text_embed, text_encodings=encodings, text_mask=mask, seeds=torch.arange(rows), steps=2
    )


@needs_openvino
def test_openvino_samples_in_bfloat16(tmp_path, monkeypatch):
    """Catches: a mask or a dtype that is lost, a model that is converted again, fixed shapes."""
    import openvino

    exact, plain = (sample_prior(pipeline(dtype), 3) for dtype in (torch.float64, torch.bfloat16))
    made = sample_prior(pipeline(torch.bfloat16).compile("openvino", cache_dir=tmp_path), 3)
    assert made.dtype == plain.dtype and (made - exact).norm() <= 3 * (plain - exact).norm()
    monkeypatch.setattr(openvino, "convert_model", None)
    again = pipeline(torch.bfloat16).compile("openvino", cache_dir=tmp_path)
    assert torch.equal(sample_prior(again, 3), made)
    difference = sample_prior(again, 1, LONGER) - sample_prior(pipeline(), 1, LONGER)
    assert difference.abs().max() < 0.02


@needs_openvino
def test_openvino_computes_a_unet(tmp_path):
    """Catches: arguments in another order, keys of another layer, an op with another formula."""
    unet = UNet(3, 3, channels=(16,), layers_per_block=1, attention_levels=(0,), head_dim=8, cross_dim=4,
                num_groups=4)  # fmt: skip
    fill_zeros(unet.eval())
    inputs = torch.randn(2, 3, 4, 4), torch.tensor([3.0, 500.0])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        inputs = *inputs, unet.encode_context(torch.randn(2, 5, 4), mask), torch.randn(2, 64)
        expected = unet(*inputs)
        unet.forward = CompiledNetwork(unet, "forward", unet.config, OpenVINO(), tmp_path)
        torch.testing.assert_close(unet(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_inductor_computes_the_same(tmp_path, monkeypatch):
    """Catches: a wrong layout of arguments, weights of another pipeline, a second compilation."""
    expected = sample_prior(pipeline(), 3)
    pipe = pipeline().compile("inductor", cache_dir=tmp_path)
    torch.testing.assert_close(sample_prior(pipe, 3), expected)
    monkeypatch.setattr(inductor, "exported", None)
    other = tiny_pipeline(seed=1).eval()
    expected = sample_prior(other, 1, LONGER)
    other.compile("inductor", cache_dir=tmp_path)
    torch.testing.assert_close(sample_prior(other, 1, LONGER), expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(backend="tensorrt"), "backend: expected inductor, openvino or eager, got 'tensorrt'"),
        (dict(mode="fast"), "mode: expected 'default' or 'max-autotune', got 'fast'"),
        (dict(backend="eager", freezing=True), "mode, freezing: expected with the backend inductor alone"),
    ],
)
def test_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        pipeline().compile(**arguments)


def test_openvino_says_what_is_missing(monkeypatch):
    """Catches: an error inside of the first image instead of one that names the package or the dtype."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install openvino"):
        pipeline().compile("openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="takes float32 and bfloat16, got weights of torch.float16"):
        pipeline(torch.float16).compile("openvino")
    with pytest.raises(ValueError, match="runs on a CPU, got weights on meta"):
        pipeline().to("meta").compile("openvino")


def test_command_line(recorded, tmp_path, monkeypatch, capsys):
    """Catches: an option that changes nothing, and images that do not say how they were made."""
    _, recorder = recorded()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = pipeline().save_pretrained(tmp_path / "checkpoint")
    words = ["generate", CAPTION, "--checkpoint", str(checkpoint), "--device", "cpu", "--dtype", "fp32",
             "--output", str(tmp_path / "x.png"), "--quiet", "--compile", "openvino"]  # fmt: skip
    assert cli.main(words) == 0
    assert "backend:    openvino" in capsys.readouterr().out
    assert len(recorder.built) == 3 == len(list((tmp_path / "dalle2_fast" / "compiled").iterdir()))


def test_the_folder_of_programs(tmp_path, monkeypatch):
    """Catches: a folder in the working directory, half a program after an error, one that others read."""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = store.default_folder()
    assert folder == tmp_path / ".cache" / "dalle2_fast" / "compiled"

    def fail(path):
        (path / "half").touch()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        store.find_or_build(folder, {}, fail)
    assert list(folder.iterdir()) == [] and folder.stat().st_mode & 0o777 == 0o700

    def slower(path):  # another process finishes first
        store.find_or_build(folder, {}, lambda other: (other / "first").touch())
        (path / "second").touch()

    found = store.find_or_build(folder, {}, slower)
    assert sorted(path.name for path in found.iterdir()) == ["facts.json", "first"]
    assert len(list(folder.iterdir())) == 1


def test_facts_that_change_a_program():
    """Catches: two programs under one name."""
    pipe = pipeline()
    before = store.digest_of_weights(pipe)
    with torch.no_grad():
        pipe.decoder.unet.conv_out.bias[0] += 1e-6
    assert store.digest_of_weights(pipe) != before
    assert inductor.Inductor("default", False).facts() != inductor.Inductor("default", True).facts()
    assert inductor.Inductor("default", False).facts()["threads"] == torch.get_num_threads()
