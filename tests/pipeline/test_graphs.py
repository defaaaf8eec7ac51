"""Graphs of whole runs: when they are captured, replayed and dropped, and what is said where there are none.

A tape of operations takes the place of CUDA graphs: a replay runs none of the Python code of a step.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dalle2_fast import ARPrior, cli
from dalle2_fast.cuda_graphs import CudaGraphs
from dalle2_fast.diffusion.graphs.cache import CaptureError, StageGraphs
from dalle2_fast.pipeline.compilation import graphs
from tests.support.graphs.runs import pipeline
from tests.support.graphs.tape import TapeGraphs

CAPTION, OTHER = "a red ring", "a blue square"  # of one length: on a CPU, padding is cut off
FEW = dict(seed=0, steps=3, prior_steps=3, upsampler_steps=2)
SMALL = dict(size=16, upsampler_steps=None)  # no upsampler runs
STAGES = ("prior", "decoder", "upsampler")


@pytest.fixture
def tape(monkeypatch):
    """The CPU has graphs."""
    monkeypatch.setattr(graphs, "CudaGraphs", TapeGraphs)


@pytest.fixture
def pipe(tape):
    return pipeline()


def cache_of(pipe):
    return graphs.graphs_of(pipe, True)


def plain(pipe, caption=CAPTION, count=2, **options):
    return pipe.generate(caption, count, graphs=False, **FEW | options)


def graphed(pipe, caption=CAPTION, count=2, wanted="auto", **options):
    return pipe.generate(caption, count, graphs=wanted, **FEW | options)


def same(made, expected) -> bool:
    pairs = ("images", "low_res", "image_embed")
    return all(torch.equal(getattr(made, name), getattr(expected, name)) for name in pairs)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_replays_equal_the_loop(pipe, sampler):
    """Catches: a seed, caption, weight, coefficient or number of steps of the first call in a later one."""
    options = dict(sampler=sampler, prior_guidance=2.0, guidance_interval=(-4.0, 1.0))
    made = graphed(pipe, **options)
    assert made.graphs == dict.fromkeys(STAGES, "captured") and same(made, plain(pipe, **options))
    options |= dict(seed=7, guidance=1.5, steps=4, guidance_interval=(-3.0, 2.0))
    made = graphed(pipe, OTHER, **options)
    assert made.graphs == dict.fromkeys(STAGES, "replayed") and same(made, plain(pipe, OTHER, **options))
    backend = cache_of(pipe).graphs
    assert backend.captured == len(cache_of(pipe)) == 4 and backend.warm_ups == 8  # the decoder has two
    assert backend.replayed == (3 + 3 + 2) + (3 + 4 + 2)


def test_other_shapes_samplers_and_dtypes_have_other_graphs(pipe):
    """Catches: a graph that runs on shapes, constants or dtypes it was not captured for."""
    for options in (dict(), dict(count=3), dict(sampler="ddim"), dict(guidance=1.0), dict(batch_size=1)):
        made = graphed(pipe, **options)
        assert same(made, plain(pipe, **options)), options
    assert made.graphs["decoder"] == "captured; replayed"  # the batches of one call
    before = cache_of(pipe).captured
    pipe.double()
    made = graphed(pipe)
    assert made.graphs == dict.fromkeys(STAGES, "captured") and same(made, plain(pipe))
    assert cache_of(pipe).captured == before + 3


def test_weights_written_in_place_are_seen_and_replaced_ones_recaptured(pipe):
    """Catches: a graph that reads the memory of weights that no longer exist, a needless capture."""
    first = graphed(pipe)
    weights = {name: 1.5 * value for name, value in pipe.state_dict().items()}
    pipe.load_state_dict(weights)
    made = graphed(pipe)
    assert made.graphs["decoder"] == "replayed"
    assert same(made, plain(pipe)) and not torch.equal(made.images, first.images)
    convolution = pipe.decoder.unet.conv_out
    for replaced in (
        lambda: setattr(convolution.weight, "data", convolution.weight.data + 0.1),
        lambda: setattr(convolution, "bias", torch.nn.Parameter(convolution.bias + 0.1)),
    ):
        replaced()
        made = graphed(pipe)
        assert made.graphs["decoder"] == "captured again, because weights were replaced"
        assert made.graphs["prior"] == "replayed" and same(made, plain(pipe))
    assert len(cache_of(pipe)) == 3


def test_the_least_recently_used_graphs_are_dropped(pipe):
    """Catches: graphs without end, and one that is dropped although it was just used."""
    cache_of(pipe).limit = 4
    first, second = SMALL, SMALL | dict(sampler="ddim")
    for options in (first, second, first):
        graphed(pipe, **options)
    assert len(cache_of(pipe)) == 4
    assert graphed(pipe, **first).graphs["decoder"] == "replayed"
    graphed(pipe, **SMALL | dict(sampler="ddpm"))
    assert len(cache_of(pipe)) == 4
    assert graphed(pipe, **first).graphs == dict(prior="replayed", decoder="replayed")
    assert graphed(pipe, **second).graphs == dict(prior="captured", decoder="captured")


def test_short_memory_names_the_sizes_and_leaves_the_loop_working(pipe, monkeypatch):
    """Catches: an error without sizes, graphs that keep the memory, a call that fails where "auto" can go on,
    and one that tries again every time."""
    graphed(pipe, **SMALL)
    monkeypatch.setattr(TapeGraphs, "memory", 0)
    cache_of(pipe).graphs.memory = 0
    says = "upsampler: the device has too little memory to capture the step of 2 sample.s. of 3 x 32 x 32"
    with pytest.raises(CaptureError, match=says):
        graphed(pipe, wanted=True)
    assert len(cache_of(pipe)) == 0 and cache_of(pipe).graphs.released == 1
    with pytest.warns(RuntimeWarning) as warned:
        made = graphed(pipe)
    assert "prior: without graphs: the device has too little memory" in str(warned[0].message)
    assert same(made, plain(pipe)) and "too little memory" in made.graphs["upsampler"]
    released = cache_of(pipe).graphs.released
    with pytest.warns(RuntimeWarning):
        graphed(pipe)
    assert cache_of(pipe).graphs.released == released
    cache_of(pipe).graphs.memory = 10
    assert graphed(pipe, wanted=True).graphs["upsampler"] == "captured"
    assert graphed(pipe).graphs["upsampler"] == "replayed"


def test_an_operation_that_cannot_be_captured_is_named(pipe, monkeypatch):
    """Catches: an error that is taken for want of memory, or that hides its cause."""
    kind = type(pipe.prior.net)
    denoise = kind.denoise
    monkeypatch.setattr(kind, "denoise", lambda net, x, *rest: denoise(net, x * x.mean().item(), *rest))
    with pytest.raises(CaptureError, match="prior: cannot capture the step of 4 .*: _local_scalar_dense"):
        graphed(pipe, wanted=True)
    with pytest.warns(RuntimeWarning):
        assert same(graphed(pipe), plain(pipe))


def test_what_cannot_be_captured_says_why(pipe):
    """Catches: a callback that sees one state, hooks and programs that run once, tiles that fail."""
    image, mask = torch.rand(3, 16, 16), torch.ones(16, 16)
    made = pipe.inpaint(image, mask, CAPTION, 2, resample=2, jump=1, steps=2)
    assert "inpainting with resampling" in made.graphs["decoder"]
    assert pipe.inpaint(image, mask, CAPTION, 2, steps=2).graphs["decoder"] == "captured"
    assert "plain function" in graphed(pipe, tile=16).graphs["upsampler"]
    handle = pipe.decoder.unet.conv_in.register_forward_hook(lambda *_: None)
    assert "hooks" in graphed(pipe).graphs["decoder"]
    handle.remove()
    pipe.decoder.unet.forward = lambda *args: type(pipe.decoder.unet).forward(pipe.decoder.unet, *args)
    assert "compiled program" in graphed(pipe).graphs["decoder"]
    del pipe.decoder.unet.forward
    with torch.autocast("cpu"):
        assert "autocast" in graphed(pipe).graphs["decoder"]
    assert graphed(pipe).graphs["decoder"] == "replayed"
    states, request = [], StageGraphs(cache_of(pipe), "upsampler")
    options = dict(seeds=torch.tensor([0]), steps=3, callback=lambda *state: states.append(state))
    pipe.upsampler.sample(torch.rand(1, 3, 16, 16), graphs=request, **options)
    assert request.outcome == "without graphs: a callback sees the state of every step" and len(states) == 3


def test_an_autoregressive_prior_has_no_graph(pipe):
    """Catches: an argument that it does not take."""
    net = dict(dim=16, depth=1, heads=2, embed_dim=16, text_dim=16, context_length=8, num_components=4,
               num_buckets=4, num_dot_buckets=4)  # fmt: skip
    pipe.prior = ARPrior(net)
    generator = torch.Generator().manual_seed(0)
    pipe.prior.fit(*torch.nn.functional.normalize(torch.randn(2, 32, 16, generator=generator), dim=2))
    made = pipe.eval().generate(CAPTION, 1, seed=0, steps=2, upsampler_steps=2)
    assert made.graphs["prior"] == "without graphs: the stage is no diffusion"


def test_progress_follows_the_device(pipe):
    """Catches: a bar that is full before the device has begun, and one that blocks the steps."""
    seen = []

    def progress(stage, steps, total):
        for step in steps:
            seen.append((stage, total))
            yield step

    expected = plain(pipe)
    assert same(graphed(pipe, progress=progress), expected)
    backend = cache_of(pipe).graphs
    assert seen.count(("decoder", 3)) == 3 and len(backend.waited) == 2 * (3 + 3 + 2)
    graphed(pipe)
    assert len(backend.waited) == 2 * (3 + 3 + 2), "nobody asked for progress"


def test_capture_ahead_of_time(pipe):
    """Catches: a capture whose graphs the call does not find, a report of another number."""
    report = pipe.capture(CAPTION, 2, **FEW)
    assert report.stages == dict.fromkeys(STAGES, "captured") and (report.captured, report.kept) == (3, 3)
    assert "3 graph(s) captured" in str(report)
    assert graphed(pipe).graphs == dict.fromkeys(STAGES, "replayed")
    assert pipe.capture([CAPTION, OTHER], 1, **FEW).captured == 0
    assert pipe.release_graphs() is pipe and len(cache_of(pipe)) == 0
    assert graphed(pipe).graphs == dict.fromkeys(STAGES, "captured")


def test_copies_and_pickles_stay_possible(pipe):
    """Catches: a pipeline that cannot be saved once it has graphs, a copy that replays its source's."""
    made = graphed(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        again = graphed(other)
        assert again.graphs == dict.fromkeys(STAGES, "captured") and same(again, made)


def test_other_methods_take_graphs(pipe):
    """Catches: an editing method that refuses the argument or does not pass it on."""
    image = torch.rand(3, 16, 16)
    made = pipe.variations(image, 2, steps=2, seed=0)
    assert made.graphs == dict(decoder="captured", upsampler="captured")
    expected = pipe.variations(image, 2, steps=2, seed=0, graphs=False)
    assert expected.graphs == {} and torch.equal(made.images, expected.images)


def test_a_device_without_graphs():
    """Catches: an option that is accepted and ignored, a CPU that "auto" fails on."""
    pipe = pipeline()
    says = "graphs: expected False or 'auto' here, because CUDA graphs need a CUDA device, got cpu"
    for call in (lambda: graphed(pipe, wanted=True), lambda: pipe.capture(num_images=1)):
        with pytest.raises(ValueError, match=says):
            call()
    assert graphed(pipe).graphs == {}
    with pytest.raises(ValueError, match="graphs: expected True, False or 'auto', got 'on'"):
        graphed(pipe, wanted="on")
    with pytest.raises(TypeError, match="graphs: expected True, False or 'auto', got 1"):
        graphed(pipe, wanted=1)
    with pytest.raises(ValueError, match="device: CUDA graphs need a CUDA device, got cpu"):
        CudaGraphs(torch.device("cpu"))


def test_command_line(tape, tmp_path, capsys, monkeypatch):
    """Catches: a flag that changes nothing, a reason that nobody reads, a traceback."""
    checkpoint = pipeline().save_pretrained(tmp_path / "checkpoint")
    words = ["generate", CAPTION, "--checkpoint", str(checkpoint), "--device", "cpu", "--dtype", "fp32",
             "--num-images", "1", "--output", str(tmp_path / "x.png"), "--quiet", "--size", "16"]  # fmt: skip
    assert cli.main([*words, "--graphs"]) == 0
    assert "graphs:     prior: captured; decoder: captured" in capsys.readouterr().out
    assert cli.main([*words, "--no-graphs"]) == 0
    assert "graphs:" not in capsys.readouterr().out
    monkeypatch.undo()
    assert cli.main([*words, "--graphs"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--graphs: expected False or 'auto' here" in error


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_replays_what_the_loop_computes(dtype):
    """Catches: memory that two graphs of one pool write at once, a freed buffer, weights that moved."""
    pipe, atol = pipeline().to("cuda", dtype), 1e-3 if dtype == torch.float32 else 2e-2
    options = dict(prior_guidance=2.0, guidance_interval=(-4.0, 1.0))
    report = pipe.capture(num_images=2, **FEW | options)
    assert report.stages == dict.fromkeys(STAGES, "captured") and report.captured == 4
    for caption, seed in ((CAPTION, 1), ("a blue square above a ring", 2), (CAPTION, 1)):
        made = graphed(pipe, caption, seed=seed, **options)
        assert made.graphs == dict.fromkeys(STAGES, "replayed")
        expected = plain(pipe, caption, seed=seed, **options)
        torch.testing.assert_close(made.images, expected.images, rtol=0, atol=atol)
    pipe.load_state_dict({name: 1.5 * value for name, value in pipe.state_dict().items()})
    made, expected = graphed(pipe, **options), plain(pipe, **options)
    torch.testing.assert_close(made.image_embed, expected.image_embed, rtol=0, atol=atol)
