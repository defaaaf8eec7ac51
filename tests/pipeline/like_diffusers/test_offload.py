"""pipe.to and CPU offload: where each network is, and when. `offload_to(pipe, "cpu")` runs the same code
without a GPU; the moves are recorded."""

from __future__ import annotations

import copy

import pytest
import torch

from dalle2_fast.pipeline.like_diffusers.offload import offload_to, resident
from tests.support.tiny_pipeline import tiny_pipeline

IMAGE = torch.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16)


@pytest.fixture
def offloaded(monkeypatch):
    """A pipeline whose stages move to a device that computes like the CPU, and the list of their moves."""
    pipe, moves = tiny_pipeline().eval(), []
    offload_to(pipe, torch.device("cpu", 0))
    for name, network in pipe.named_children():
        def move(device, name=name):
            moves.append((name, str(device)))

        monkeypatch.setattr(network, "to", move)
    return pipe, moves


def test_each_stage_is_there_while_it_runs_and_alone(offloaded):
    """Catches: a stage that runs where its weights are not, or that stays on the GPU."""
    pipe, moves = offloaded
    made = pipe.generate("a red ring", 2, seed=0, candidates=2)
    order = ["clip", "prior", "decoder", "clip", "upsampler"]
    assert moves == [(name, device) for name in order for device in ("cpu:0", "cpu")]
    expected = tiny_pipeline().eval().generate("a red ring", 2, seed=0, candidates=2)
    assert torch.equal(made.images, expected.images)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("variations", ["clip", "decoder", "upsampler"]),
        ("text_diff", ["clip", "clip", "clip", "decoder", "decoder", "upsampler"]),
        ("inpaint", ["clip", "decoder", "upsampler"]),
    ],
)
def test_methods_that_begin_with_an_image_move_what_they_need(offloaded, method, parts):
    """Catches: a call of a network past the stages, which would find it on the CPU."""
    pipe, moves = offloaded
    args = {"text_diff": ("a red ring", "a blue ring", 2), "inpaint": (torch.ones(16, 16),)}.get(method, ())
    few = {"inversion_steps": 2} if method == "text_diff" else {}
    getattr(pipe, method)(IMAGE, *args, seed=0, steps=2, **few)
    assert [name for name, _ in moves[::2]] == parts and {device for _, device in moves[1::2]} == {"cpu"}


def test_a_stage_moves_back_after_an_error(offloaded, monkeypatch):
    """Catches: a GPU that stays full after an interrupt."""
    pipe, moves = offloaded

    def fails(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.decoder, "sample", fails)
    with pytest.raises(KeyboardInterrupt):
        pipe.generate("a red ring", 1, seed=0)
    assert moves[-1] == ("decoder", "cpu")


def test_weights_really_move():
    """Catches: moves that the recording above would not show to be none: the meta device has no weights."""
    pipe = tiny_pipeline().eval()
    offload_to(pipe, torch.device("meta"))
    assert pipe.device.type == "meta" and {p.device.type for p in pipe.parameters()} == {"cpu"}
    with pytest.raises(NotImplementedError, match="meta"):  # on the way back, from a device without data
        with resident(pipe, "clip"):
            assert {p.device.type for p in pipe.clip.parameters()} == {"meta"}
            assert {p.device.type for p in pipe.decoder.parameters()} == {"cpu"}


def test_graphs_are_refused_with_offload(offloaded):
    """Catches: a replay of steps that reads weights where they no longer are."""
    with pytest.raises(ValueError, match="graphs: expected False or 'auto' with enable_model_cpu_offload"):
        offloaded[0].generate("a red ring", 1, seed=0, graphs=True)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "auto-gpu"])
def test_the_cpu_is_refused_by_name(device):
    """Catches: an offload that copies every network from the CPU to the CPU."""
    with pytest.raises(ValueError, match="^device: expected auto, cuda, mps or cuda:N, got"):
        tiny_pipeline().enable_model_cpu_offload(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused():
    """Catches: torch's error in the first call instead of one line at once."""
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="^device: expected a device of this machine, got cuda"):
        pipe.enable_model_cpu_offload()
    assert pipe.device.type == "cpu"


def test_to_moves_everything_and_returns_the_pipeline(offloaded):
    """Catches: `pipe = pipe.to(...)` that is None, a network left behind, offload that outlives a move."""
    pipe = tiny_pipeline()
    assert pipe.to(torch.float64) is pipe and {p.dtype for p in pipe.parameters()} == {torch.float64}
    assert pipe.to("meta") is pipe
    assert {t.device.type for t in (*pipe.parameters(), *pipe.buffers())} == {"meta"}
    pipe = offloaded[0]
    assert pipe.to(torch.float32).device.index == 0  # a dtype does not end it
    assert pipe.to("cpu").device == torch.device("cpu")


def test_repr_is_one_line_and_says_what_the_pipeline_is():
    """Catches: the page of layers that nn.Module prints."""
    pipe = tiny_pipeline()
    text = repr(pipe)
    assert text.startswith("DALLE2(clip ") and text.endswith(" parameters; cpu, float32; sizes 16, 32)")
    decoder = sum(p.numel() for p in pipe.decoder.parameters())
    assert f"decoder {decoder:,}" in text and "\n" not in text and "upsampler2" not in text
    assert repr(copy.deepcopy(pipe)) == text


@pytest.mark.gpu
def test_offload_on_a_gpu():
    """Catches: weights on the GPU between calls, or images that are not those of the GPU."""
    pipe = tiny_pipeline().eval()
    pipe.enable_model_cpu_offload()
    images = pipe("a red ring", 2, seed=0)
    assert {p.device.type for p in pipe.parameters()} == {"cpu"}
    assert (images - pipe.to("cuda")("a red ring", 2, seed=0, graphs=False)).abs().max() < 1e-4
