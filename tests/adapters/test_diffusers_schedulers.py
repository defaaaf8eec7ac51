"""Our schedulers in diffusers' loops: each step against diffusers' step, the source of the noise, errors."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch

from dalle2_fast import functional
from dalle2_fast.adapters import diffusers as adapter
from tests.support.truth import assert_close_to_truth


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


UNCLIP = [
    dict(prediction_type="epsilon", variance_type="learned_range"),
    dict(prediction_type="epsilon", variance_type="fixed_small_log"),
    dict(prediction_type="sample", variance_type="learned_range", clip_sample_range=0.7),
    dict(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0),
    dict(prediction_type="epsilon", variance_type="fixed_small_log", clip_sample=False),
]
DDPM = [
    dict(),
    dict(variance_type="learned_range", beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0),
    dict(variance_type="fixed_large", prediction_type="v_prediction", timestep_spacing="trailing"),
    dict(variance_type="fixed_small_log", prediction_type="sample", steps_offset=1),
    dict(thresholding=True),
]
DDIM = [
    dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    dict(clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=False),
    dict(clip_sample=True),
]


def pair(diffusers, name: str, options: dict):
    theirs = getattr(diffusers, name)(**options)
    ours = getattr(adapter, name).from_config(theirs.config)
    assert isinstance(ours, getattr(diffusers, name)) and dict(ours.config) == dict(theirs.config)
    return theirs, ours


def all_steps(scheduler, steps: int, dtype: torch.dtype, call, channels: int = 2, shape=(4, 4)):
    """All steps with invented outputs of a network. call(scheduler, output, t, x, index) runs one step."""
    scheduler.set_timesteps(steps)
    learned = scheduler.config.get("variance_type") in ("learned_range", "learned")
    x, found = randn(2, channels, *shape).to(dtype), []
    for index, t in enumerate(scheduler.timesteps):
        width = channels * (2 if learned else 1)
        out = call(scheduler, randn(2, width, *shape, seed=index).mul(0.6).to(dtype), t, x, index)
        found += [out.prev_sample, out.pred_original_sample]
        x = found[0] = out.prev_sample  # the next steps see the error of this one
    return torch.cat([one.flatten(1) for one in found], dim=1)


def assert_equal_steps(diffusers, name: str, options: dict, call, monkeypatch, **kwargs) -> None:
    """Ours in float32 and theirs in float32 against theirs in float64; call(..., noise) is a step in which
    theirs would sample this noise."""
    theirs, ours = pair(diffusers, name, options)
    noise: list[torch.Tensor] = []
    module = sys.modules[type(theirs).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, dtype=None, **__: noise[0].to(dtype))
    exact = copy.deepcopy(theirs)
    exact.betas = exact.betas.double()
    exact.alphas = 1 - exact.betas
    exact.alphas_cumprod = exact.alphas.cumprod(0)
    exact.one = torch.ones((), dtype=torch.float64)
    if name == "DDIMScheduler":
        first = exact.one if options.get("set_alpha_to_one", True) else exact.alphas_cumprod[0]
        exact.final_alpha_cumprod = first

    def with_noise(scheduler, output, t, x, index):
        noise[:] = [randn(*x.shape, seed=99 + index)]
        return call(scheduler, output, t, x, index, noise[0].to(x.dtype))

    results = [
        all_steps(scheduler, 7, dtype, with_noise, **kwargs)
        for scheduler, dtype in ((ours, torch.float32), (theirs, torch.float32), (exact, torch.float64))
    ]
    assert_close_to_truth(*results)


@pytest.mark.parametrize("options", UNCLIP, ids=str)
@pytest.mark.parametrize("shape", [(4, 4), ()], ids=["images", "embeddings"])
def test_unclip_steps_are_theirs(diffusers, options, shape, monkeypatch):
    """Catches: a wrong coefficient, bound, range or last step; strides between timesteps that are ignored."""

    def call(scheduler, output, t, x, index, noise):
        times = scheduler.timesteps
        previous = times[index + 1] if index + 1 < len(times) else None
        given = dict(noise=noise) if isinstance(scheduler, adapter.UnCLIPScheduler) else {}
        return scheduler.step(output, t, x, previous, **given)

    assert_equal_steps(diffusers, "UnCLIPScheduler", options, call, monkeypatch, shape=shape)


@pytest.mark.parametrize("options", DDPM, ids=str)
def test_ddpm_steps_are_theirs(diffusers, options, monkeypatch):
    """Catches: as above; the fused step for options that it does not support."""

    def call(scheduler, output, t, x, index, noise):
        fused = isinstance(scheduler, adapter.DDPMScheduler) and not options.get("thresholding")
        return scheduler.step(output, t, x, **(dict(noise=noise) if fused else {}))

    assert_equal_steps(diffusers, "DDPMScheduler", options, call, monkeypatch)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("options", DDIM, ids=str)
def test_ddim_steps_are_theirs(diffusers, options, eta, monkeypatch):
    """Catches: as above; a direction from the bounded x0 where theirs uses the network's x0."""

    def call(scheduler, output, t, x, index, noise):
        bounded = dict(use_clipped_model_output=bool(index % 2))
        return scheduler.step(output, t, x, eta=eta, variance_noise=noise if eta else None, **bounded)

    assert_equal_steps(diffusers, "DDIMScheduler", options, call, monkeypatch)


@pytest.mark.parametrize("options", UNCLIP[:2], ids=str)
def test_noise_that_the_op_samples(diffusers, options, monkeypatch):
    """Catches: a wrong standard deviation of sampled noise; seeds that are not the generator's."""
    theirs, ours = pair(diffusers, "UnCLIPScheduler", options)
    learned = options["variance_type"] == "learned_range"
    output, x = randn(3, 4 if learned else 2, 8, 8), randn(3, 2, 8, 8, seed=1)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
    t, previous = ours.timesteps[1], ours.timesteps[2]
    seeds = torch.tensor([4, 5, 6])
    got = ours.step(output, t, x, previous, seeds=seeds)
    index = ours._table((int(t), int(previous)), x, 0.0)[1]
    noise = functional.sample_noise(seeds, index, x.shape)
    module = sys.modules[type(theirs).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise)
    expected = theirs.step(output, t, x, previous)
    torch.testing.assert_close(got.prev_sample, expected.prev_sample, rtol=1e-5, atol=1e-6)

    def generated(seed):
        return ours.step(output, t, x, previous, generator=torch.Generator().manual_seed(seed)).prev_sample

    assert torch.equal(generated(1), generated(1)) and not torch.equal(generated(1), generated(2))
    one_each = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    alone = ours.step(output[1:2], t, x[1:2], previous, generator=[torch.Generator().manual_seed(2)])
    batch = ours.step(output, t, x, previous, generator=one_each)
    assert torch.equal(batch.prev_sample[1:2], alone.prev_sample)
    again = ours.step(output, t, x, previous, generator=one_each)  # a generator continues
    assert not torch.equal(again.prev_sample, batch.prev_sample)


def test_a_step_reads_nothing_from_the_device(diffusers, monkeypatch):
    """Catches: a timestep that is read from the device in every step; a table that is built again."""
    ours = adapter.UnCLIPScheduler()
    ours.set_timesteps(5)
    times, x = ours.timesteps, randn(1, 2, 4, 4)
    ours.step(x, times[0], x, times[1])
    tables = ours._tables
    for method in ("__int__", "item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_: pytest.fail("read from the device"))
    for index in range(1, 4):
        ours.step(x, times[index], x, times[index + 1], return_dict=False)
    ours.step(x, times[4], x, seeds=torch.tensor([1]))
    assert ours._tables is tables and len(tables) == 1
    monkeypatch.undo()
    values = [ours.step(x, t, x, 100, seeds=torch.tensor([1])).prev_sample for t in (times[1], int(times[1]))]
    assert torch.equal(*values)
    times[1] = 600  # changed in index: the index of a view gives the new value
    assert ours._int_of(times[1]) == 600
    ours.set_timesteps(3)
    assert ours._int_of(ours.timesteps[1]) == int(ours.timesteps[1])


def test_the_schedulers_are_diffusers_own(diffusers, tmp_path):
    """Catches: configs, pickles or class names that diffusers cannot read back."""
    ours = adapter.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    assert pickle.loads(pickle.dumps(ours)).config == ours.config
    ours.save_pretrained(tmp_path)
    back = diffusers.UnCLIPScheduler.from_pretrained(tmp_path)
    assert type(back) is diffusers.UnCLIPScheduler and back.config.clip_sample_range == 5.0
    noisy = ours.add_noise(randn(2, 3), randn(2, 3, seed=1), torch.tensor([5, 900]))
    assert torch.equal(noisy, back.add_noise(randn(2, 3), randn(2, 3, seed=1), torch.tensor([5, 900])))


def test_wrong_steps_are_named(diffusers):
    ours = adapter.UnCLIPScheduler()
    x = randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="prev_timestep: expected less than timestep = 5, got 7"):
        ours.step(x, 5, x, 7)
    with pytest.raises(ValueError, match=r"model_output: expected \[B, C, ...\]"):
        ours.step(randn(2, 6, 4, 4), 5, x)
    with pytest.raises(ValueError, match="noise: expected without generator and seeds"):
        ours.step(x, 5, x, noise=x, seeds=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="generator: expected one per sample, 2, got 1"):
        ours.step(x, 5, x, generator=[torch.Generator()])
    ddpm = adapter.DDPMScheduler()
    ddpm.set_timesteps(3)
    with pytest.raises(ValueError, match="timestep: expected one of scheduler.timesteps, got 5"):
        ddpm.step(x, 5, x)
    with pytest.raises(ValueError, match="noise, seeds: expected None because of thresholding"):
        adapter.DDPMScheduler(thresholding=True).step(x, 5, x, seeds=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="num_inference_steps"):
        adapter.DDIMScheduler(clip_sample=False).step(x, 5, x)


def test_a_schedule_of_one_step(diffusers):
    """Catches: diffusers' division by zero for one step, and an empty schedule for none."""
    scheduler = adapter.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999] and scheduler.num_inference_steps == 1
    x, x0 = randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    made = scheduler.step(x0, scheduler.timesteps[0], x, prev_timestep=-1, seeds=torch.tensor([1]))
    assert bool(made.prev_sample.isfinite().all())
    for steps in (0, -3):
        with pytest.raises(ValueError, match=f"num_inference_steps: expected at least 1, got {steps}"):
            scheduler.set_timesteps(steps)
