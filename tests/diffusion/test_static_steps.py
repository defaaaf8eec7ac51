"""Static steps equal the loop bit for bit for every sampler, and the host waits for none of them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.diffusion.graphs.plan import ConditionedNet
from dalle2_fast.diffusion.graphs.static import StaticSteps
from dalle2_fast.ops import _dispatch
from tests.support.graphs.fake_cuda import on_fake_cuda, synchronisations
from tests.support.graphs.runs import STAGES, WithoutCapture, pipeline, sample

INTERVAL = (-4.0, 1.0)  # some of 4 steps are inside, some outside
SAMPLERS = [("ddpm", 0.0, INTERVAL), ("ddim", 0.0, None), ("ddim", 0.7, None), ("dpm++", 0.0, None),
            ("dpm++", 0.0, INTERVAL)]  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def other_run(options: dict) -> dict:
    """Another run that the same graph serves: caption, seeds, number of steps and weight differ."""
    changed = dict(caption="a blue ring", seeds=torch.tensor([9, 4]), steps=6)
    if "guidance" in options:
        changed["guidance"] = 1.5
    return options | changed


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sampler, eta, interval", SAMPLERS)
def test_static_steps_equal_the_loop(pipe, stage, sampler, eta, interval):
    """Catches: a step that reads another row of a table, time, seed or weight than the loop, a first step of
    dpm++ that uses the x0 of the run before, values of the first run that stay in the buffers."""
    static = WithoutCapture()
    options = dict(sampler=sampler, eta=eta, guidance=2.5, guidance_interval=interval)
    options |= dict(dynamic_threshold=0.9, guidance_rescale=0.5) if stage == "decoder" else {}
    for run in (options, other_run(options), options | dict(guidance=torch.tensor([2.0, 3.0]))):
        expected = sample(pipe, stage, **run)
        assert torch.equal(sample(pipe, stage, graphs=static, **run), expected)
    assert len(static.static) == 1, "the runs have one key"
    assert len(static.plan.nets) == (2 if interval and stage != "upsampler" else 1)


def wavy(x, time, bias):
    """A prediction and a variance for each sample."""
    wave = torch.sin(3 * x) + bias + (time / 1000)[:, None, None, None]
    return torch.cat([wave, torch.cos(wave)], dim=1)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "consistency"])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("prediction", ["v_prediction", "edm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learned_variance_known_pixels_and_a_late_start(sampler, start, dtype, prediction):
    """Catches: a variance that is dropped or kept wrongly, known pixels of another noise level, a multistep
    sampler that starts in the middle and uses a step that it did not make."""
    diffusion = GaussianDiffusion(make_schedule("cosine"), prediction, variance="learned_range")
    shape, seeds, static = (3, 2, 4, 4), torch.tensor([5, -7, 11]), WithoutCapture()
    net = ConditionedNet(wavy, (), (torch.full((3, 1, 1, 1), 0.2),))
    known = torch.linspace(-1, 1, 96).reshape(shape)
    mask = torch.tensor([True, False] * 8).reshape(1, 1, 4, 4)
    options = dict(seeds=seeds, steps=6, sampler=sampler, start=start, x_T=torch.ones(shape), dtype=dtype)
    for extra in ({}, dict(known=known, mask=mask), dict(known=-known, mask=~mask)):
        expected = diffusion.sample(net, shape, **options, **extra)
        assert torch.equal(diffusion.sample(net, shape, graphs=static, **options, **extra), expected)
    assert len(static.static) == 2


def test_the_last_network_and_a_run_in_inference_mode():
    """Catches: a last step with the network of the others, buffers that no later call may write."""
    diffusion, static = GaussianDiffusion(make_schedule("cosine"), "sample"), WithoutCapture()
    nets = [
        ConditionedNet(lambda x, t, shift: torch.sin(x) + shift, (), (torch.tensor(shift),))
        for shift in (0.1, 0.9)
    ]
    options = dict(seeds=torch.tensor([1]), steps=3, last_net=nets[1])
    expected = diffusion.sample(nets[0], (1, 2), **options)
    with torch.inference_mode():
        assert torch.equal(diffusion.sample(nets[0], (1, 2), graphs=static, **options), expected)
    assert torch.equal(diffusion.sample(nets[0], (1, 2), graphs=static, **options), expected)


def plan_on_fake_cuda(stage: str, mode: FakeTensorMode, **options):
    pipe, static = pipeline(), WithoutCapture()
    options = dict(guidance=torch.tensor([2.0, 3.0]), guidance_interval=INTERVAL) | options
    sample(pipe, stage, graphs=static, **options)
    return on_fake_cuda(static.plan, mode)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "kernels, sampler", [(False, "dpm++"), (True, "ddpm"), (True, "ddim"), (True, "dpm++")]
)
def test_no_step_makes_the_host_wait(stage, kernels, sampler, monkeypatch):
    """Catches: .item(), .cpu(), nonzero or a number sent to the device in a step of any stage, with the
    references and where the kernels are called (what they compute is not run)."""
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(_dispatch, "why_gpu_unsupported", lambda device: None)
    monkeypatch.setattr(_dispatch, "_kernel_answers", {})
    mode = FakeTensorMode()
    threshold = dict(dynamic_threshold=0.9) if stage == "decoder" else {}
    plan = plan_on_fake_cuda(stage, mode, sampler=sampler, **threshold)
    with mode:
        static = StaticSteps(plan)
    for step in static.steps:
        found, ours = synchronisations(step, mode)
        assert found == []
        assert ("diffusion_step" in ours) == kernels
    assert synchronisations(lambda: static.begin(plan), mode)[0] == []


@pytest.mark.parametrize(
    "fault, says",
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x * 2 if x.mean() > 0 else x, "is_nonzero|_local_scalar_dense"),
        (lambda x: x.cpu(), "cpu and cuda"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x + torch.tensor([1.0, 2.0]).to(x.device), "cpu and cuda|CUDA|cuda"),
        (lambda x: x.double().tolist(), "_local_scalar_dense|cpu|Error"),
    ],
)
def test_a_step_that_waits_is_found(fault, says):
    """Catches: a search that finds nothing. The network of the step is mutated."""
    mode = FakeTensorMode()
    plan = plan_on_fake_cuda("decoder", mode, guidance_interval=None)
    with mode:
        static = StaticSteps(plan)
    net, guided = static.nets[0]

    def mutated(unet, x, *rest):
        fault(x)
        return net.function(unet, x, *rest)

    static.nets = ((ConditionedNet(mutated, net.modules, net.conditions), guided),)
    found, _ = synchronisations(static.steps[0], mode)
    assert found and any(word in " ".join(found) for word in says.split("|")), found
