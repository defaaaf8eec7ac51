"""Sampling: the right distribution, the same sample for the same seed, and the options around it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule, sampler_table
from tests.support.gaussian_data import DEVIATION, MEAN, exact_net

SAMPLERS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm++", 0.0), ("consistency", 0.0)]
PREDICTIONS = ("epsilon", "sample", "v_prediction", "edm")
SHAPE = (3, 2, 4, 4)
SEEDS = torch.tensor([5, -7, 2**62 + 11])


def process(prediction: str = "epsilon", name: str = "cosine", **options) -> GaussianDiffusion:
    return GaussianDiffusion(make_schedule(name), prediction, **options)


def wavy(x: Tensor, time: Tensor) -> Tensor:
    """A network that is neither linear nor exact, and treats each sample by itself."""
    return torch.sin(3 * x) + (time / 1000).reshape(-1, *([1] * (x.dim() - 1)))


def sample(diffusion: GaussianDiffusion, net=wavy, shape=SHAPE, **options) -> Tensor:
    return diffusion.sample(net, shape, **(dict(seeds=SEEDS, steps=6) | options))


# -- the right distribution ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "continuous_cosine"])
@pytest.mark.parametrize("sampler, eta", SAMPLERS[:-1])  # the last one needs another network
def test_samples_of_gaussian_data(name, sampler, eta):
    """4,000 numbers: the standard errors are 0.008 (mean) and 0.006 (deviation). Those of the tables, which
    test_sampler_tables.py bounds, are below 0.02."""
    diffusion = process("v_prediction", name)
    net = exact_net(diffusion.schedule, "v_prediction")
    seeds, steps = torch.arange(2), 50 if sampler == "dpm++" else 200
    drawn = diffusion.sample(net, (2, 2000), seeds=seeds, steps=steps, sampler=sampler, eta=eta, clip=None)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert drawn.std().item() == pytest.approx(DEVIATION, abs=0.035)
    # Normal, not only of the right moments: the quantiles too.
    levels = torch.tensor([0.05, 0.25, 0.75, 0.95])
    wanted = torch.distributions.Normal(MEAN, DEVIATION).icdf(levels)
    torch.testing.assert_close(torch.quantile(drawn.flatten(), levels), wanted, rtol=0, atol=0.08)


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_what_the_network_predicts_does_not_matter(sampler, eta):
    drawn = []
    for prediction in PREDICTIONS:
        diffusion = process(prediction)
        net = exact_net(diffusion.schedule, prediction)
        options = dict(sampler=sampler, eta=eta, clip=None, dtype=torch.float64, steps=20)
        drawn.append(sample(diffusion, net, **options))
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=1e-8, atol=1e-8)


def test_ddim_follows_the_probability_flow():
    """x_T -> x0 is known here; the same x_T must lead there, not only to the right distribution."""
    diffusion = process("sample")
    t = torch.tensor(999)
    alpha, sigma = diffusion.schedule.alpha(t), diffusion.schedule.sigma(t)
    x_T = torch.linspace(-3, 3, 7, dtype=torch.float64).reshape(1, 7)
    wanted = MEAN + DEVIATION * (x_T - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2).sqrt()
    net = exact_net(diffusion.schedule, "sample")
    options = dict(seeds=SEEDS[:1], x_T=x_T, clip=None, dtype=torch.float64)
    for sampler, steps in (("ddim", 500), ("dpm++", 60)):
        got = diffusion.sample(net, (1, 7), sampler=sampler, steps=steps, **options)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-2)


@pytest.mark.parametrize("prediction", ["v_prediction", "edm"])
def test_inversion_leads_back(prediction):
    diffusion = process(prediction)
    net = exact_net(diffusion.schedule, prediction)
    x0 = MEAN + DEVIATION * torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(1, 8)
    errors = []
    for steps in (20, 200):
        x_T = diffusion.invert(net, x0, steps=steps)
        options = dict(seeds=SEEDS[:1], steps=steps, x_T=x_T, clip=None, dtype=torch.float64)
        errors.append((diffusion.sample(net, (1, 8), **options) - x0).abs().max())
    assert errors[1] < 0.03 and errors[1] < errors[0] / 2
    torch.testing.assert_close(x_T, (x0 - MEAN) / DEVIATION, rtol=0, atol=0.05)


# -- seeds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_the_sample_depends_on_its_seed_only(sampler, eta):
    """To the bit: alone, in a batch, or in another order."""
    diffusion = process()
    together = sample(diffusion, sampler=sampler, eta=eta)
    for i in range(3):
        alone = sample(diffusion, shape=(1, *SHAPE[1:]), seeds=SEEDS[i : i + 1], sampler=sampler, eta=eta)
        assert torch.equal(alone[0], together[i])
    turned = sample(diffusion, seeds=SEEDS.flip(0), sampler=sampler, eta=eta)
    assert torch.equal(turned.flip(0), together)
    assert not torch.equal(together[0], together[1])
    torch.manual_seed(1)  # torch's default generator must not matter
    assert torch.equal(sample(diffusion, sampler=sampler, eta=eta), together)


def test_every_step_has_noise_of_its_own():
    """If x_T used the counter of a step, that step would add the same numbers again."""
    seen = []
    diffusion = process("sample", "linear")

    def net(x: Tensor, time: Tensor) -> Tensor:  # x0 = 0: what a step adds to a * x is its noise
        seen.append(x)
        return torch.zeros_like(x)

    sample(diffusion, net, sampler="ddpm", shape=(1, 4096), seeds=SEEDS[:1], steps=4)
    table = sampler_table(diffusion.schedule, diffusion.times(4), "ddpm").float()
    noises = [seen[0]] + [(seen[i + 1] - table[i, 2] * seen[i]) / table[i, 5] for i in range(3)]
    noises = torch.cat(noises)
    torch.testing.assert_close(noises.std(dim=1), torch.ones(4), rtol=0, atol=0.06)
    assert (torch.corrcoef(noises) - torch.eye(4)).abs().max() < 5 / math.sqrt(4096)


def test_a_seed_starts_at_the_same_noise_for_any_number_of_steps():
    starts = []
    for steps in (3, 11):
        seen = []
        sample(process(), lambda x, time, seen=seen: seen.append(x) or x, steps=steps)
        starts.append(seen[0])
    assert torch.equal(*starts)
    again = process().add_noise(torch.zeros(SHAPE), torch.tensor([999] * 3), seeds=SEEDS)
    torch.testing.assert_close(again, starts[0])


# -- options -------------------------------------------------------------------------------------------


def test_the_last_step_returns_the_networks_x0():
    last = {}

    def net(x: Tensor, time: Tensor) -> Tensor:
        last["x0"] = wavy(x, time)
        return last["x0"]

    for sampler, eta in SAMPLERS:
        got = sample(process("sample"), net, sampler=sampler, eta=eta, clip=None)
        assert torch.equal(got, last["x0"])
        assert sample(process("sample"), net, sampler=sampler, eta=eta, clip=0.5).abs().max() <= 0.5


def test_times_count_down_for_the_network():
    seen = []
    sample(process(), lambda x, time: seen.append(time) or x, steps=4)
    assert [time.tolist() for time in seen] == [[float(t)] * 3 for t in (999, 666, 333, 0)]
    assert all(time.dtype == torch.float32 for time in seen)
    seen.clear()
    sample(process(name="continuous_cosine"), lambda x, time: seen.append(time) or x, steps=4)
    assert [time[0].item() for time in seen] == [1000, 750, 500, 250]


@pytest.mark.parametrize("position, variance", [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_range_ends_at_the_fixed_variances(position, variance):
    def net(x: Tensor, time: Tensor) -> Tensor:
        return torch.cat([wavy(x, time), torch.full_like(x, position)], dim=1)

    learned = sample(process(variance="learned_range"), net, sampler="ddpm")
    torch.testing.assert_close(learned, sample(process(variance=variance), sampler="ddpm"))


@pytest.mark.parametrize("sampler, eta", SAMPLERS[1:])
def test_other_samplers_ignore_the_learned_variance(sampler, eta):
    def net(x: Tensor, time: Tensor) -> Tensor:
        return torch.cat([wavy(x, time), torch.full_like(x, 1e4)], dim=1)

    learned = sample(process(variance="learned_range"), net, sampler=sampler, eta=eta)
    assert torch.equal(learned, sample(process(), sampler=sampler, eta=eta))


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_guidance_is_one_call_a_step(sampler, eta):
    calls = []

    def net(x: Tensor, time: Tensor) -> Tensor:
        calls.append(x.shape)
        return torch.cat([wavy(x, time), 0.5 * wavy(x, time)])

    got = sample(process(), net, guidance=3.0, sampler=sampler, eta=eta)
    assert calls == [SHAPE] * 6
    wanted = sample(process(), lambda x, time: (0.5 + 3 * 0.5) * wavy(x, time), sampler=sampler, eta=eta)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    each = sample(process(), net, guidance=torch.tensor([3.0, 1.0, 0.0]), sampler=sampler, eta=eta)
    torch.testing.assert_close(each[0], wanted[0], rtol=1e-4, atol=1e-4)
    bare = sample(process(), wavy, sampler=sampler, eta=eta)
    torch.testing.assert_close(each[1], bare[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler, eta", SAMPLERS[:3])
def test_sampling_resumes_in_the_middle(sampler, eta):
    """One-step samplers: the state at a step, given back as x_T, leads to the same end to the bit."""
    states = []
    whole = sample(process(), sampler=sampler, eta=eta, callback=lambda step, x, x0: states.append((step, x)))
    assert [step for step, _ in states] == list(range(6)) and torch.equal(states[-1][1], whole)
    rest = sample(process(), sampler=sampler, eta=eta, x_T=states[2][1], start=3)
    assert torch.equal(rest, whole)


def test_a_noised_picture_can_be_finished():
    diffusion = process("sample")
    x0 = 0.5 * torch.ones(SHAPE)
    times = diffusion.times(6)
    x = diffusion.add_noise(x0, times[2].expand(3), seeds=SEEDS)
    for sampler in ("ddpm", "ddim", "dpm++"):
        got = sample(diffusion, lambda x, time: x0, sampler=sampler, x_T=x, start=2)
        torch.testing.assert_close(got, x0)


def test_float32_is_close_to_float64_and_half_stays_finite():
    for sampler, eta in SAMPLERS:
        options = dict(sampler=sampler, eta=eta)
        exact = sample(process("v_prediction"), dtype=torch.float64, **options)
        single = sample(process("v_prediction"), **options)
        torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-3)
        half = sample(process("v_prediction"), dtype=torch.bfloat16, **options)
        assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_progress_wraps_the_steps():
    seen = {}

    def progress(iterable, total):
        seen["total"] = total
        return iterable

    sample(process(), progress=progress, steps=5)
    assert seen["total"] == 5


def test_a_bar_is_drawn_only_on_request(capsys):
    sample(process())
    sample(process(), progress=False)
    assert capsys.readouterr().err == ""
    sample(process(), progress=True)
    assert "6/6" in capsys.readouterr().err


def test_an_empty_batch_is_empty():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert sample(process(), shape=(0, 3, 4, 4), seeds=nothing).shape == (0, 3, 4, 4)


def test_samples_carry_no_graph():
    weight = torch.ones((), requires_grad=True)
    assert not sample(process(), lambda x, time: weight * x).requires_grad


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(sampler="euler"), ValueError, "sampler: expected one of"),
        (dict(steps=0), ValueError, "steps: expected 1 to 1000"),
        (dict(steps=1001), ValueError, "steps: expected 1 to 1000"),
        (dict(eta=0.5, sampler="dpm++"), ValueError, "eta: expected 0"),
        (dict(spacing="karras"), ValueError, "spacing: .* 'log_snr', 'trailing', got 'karras'"),
        (dict(start=2), ValueError, "x_T: expected the state to start from"),
        (dict(start=6, x_T=torch.zeros(SHAPE)), ValueError, "start: expected 0 <= start < steps = 6, got 6"),
        (dict(x_T=torch.zeros(1, 2)), ValueError, r"x_T: expected \(3, 2, 4, 4\), got \(1, 2\)"),
        (dict(seeds=torch.zeros(3)), TypeError, "seeds: expected torch.int64"),
        (dict(seeds=torch.zeros(2, dtype=torch.int64)), ValueError, r"seeds: expected .*3.*got .*2"),
        (dict(seeds=[1, 2, 3]), TypeError, "seeds: expected"),
        (dict(shape=(3,)), ValueError, r"shape: expected \(B, C, ...\)"),
        (dict(net=lambda x, time: x[:, :1]), ValueError, "model_output: expected"),
        (dict(guidance=2.0), ValueError, "model_output: expected"),
    ],
)
def test_bad_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        sample(process(), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_the_gpu_draws_the_same_sample(sampler, eta):
    cpu = sample(process(), sampler=sampler, eta=eta)
    gpu = sample(process(), sampler=sampler, eta=eta, device="cuda")
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=1e-2)
