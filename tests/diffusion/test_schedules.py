"""Noise schedules against their formulas in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dalle2_fast.diffusion import Schedule, make_schedule

DISCRETE = ("cosine", "linear", "scaled_linear")
CONTINUOUS = ("continuous_cosine", "continuous_log_linear")


def some_times(schedule: Schedule) -> torch.Tensor:
    if schedule.timesteps:
        return torch.arange(schedule.timesteps)
    return torch.linspace(0, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize("name", DISCRETE + CONTINUOUS)
def test_signal_falls_and_the_variance_is_kept(name):
    schedule = make_schedule(name)
    t = some_times(schedule)
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    assert alpha.dtype == sigma.dtype == log_snr.dtype == torch.float64
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-14, atol=0)
    torch.testing.assert_close(log_snr, 2 * (alpha / sigma).log(), rtol=1e-9, atol=1e-9)
    assert (alpha.diff() < 0).all() and (log_snr.diff() < 0).all()


def test_cosine_is_improved_ddpms():
    """A wrong offset, or clipping at the wrong place, changes alpha in the third digit."""

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    kept = [1 - min(1 - f((i + 1) / 1000) / f(i / 1000), 0.999) for i in range(1000)]
    wanted = torch.tensor(kept, dtype=torch.float64).cumprod(0)
    schedule = make_schedule("cosine", 1000)
    torch.testing.assert_close(schedule.alpha(torch.arange(1000)) ** 2, wanted, rtol=1e-10, atol=0)
    # Near the data sigma^2 = 4e-5 would be all rounding if it were 1 - alpha^2 in float32.
    torch.testing.assert_close(schedule.sigma(torch.arange(1000)) ** 2, 1 - wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("timesteps", [1000, 250])
def test_linear_ends_at_the_same_noise_for_any_number_of_steps(timesteps):
    betas = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
    schedule = make_schedule("linear", timesteps)
    alpha = schedule.alpha(torch.arange(timesteps))
    torch.testing.assert_close(alpha**2, (1 - betas).cumprod(0), rtol=1e-10, atol=0)
    assert 0.004 < alpha[-1] < 0.01


def test_scaled_linear_is_linear_in_the_root():
    schedule = make_schedule("scaled_linear", 10, beta_start=0.01, beta_end=0.04)
    torch.testing.assert_close(schedule.betas.sqrt(), torch.linspace(0.1, 0.2, 10, dtype=torch.float64))


def test_continuous_cosine_is_a_cosine_within_its_bounds():
    wide = make_schedule("continuous_cosine", log_snr_min=-40.0, log_snr_max=40.0)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(wide.alpha(t), torch.cos(math.pi / 2 * t), rtol=0, atol=1e-8)
    cut = make_schedule("continuous_cosine")
    ends = cut.log_snr(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([15.0, -15.0], dtype=torch.float64))
    shifted = make_schedule("continuous_cosine", shift=-2 * math.log(4))
    torch.testing.assert_close(shifted.log_snr(t), cut.log_snr(t) - 2 * math.log(4))


@pytest.mark.parametrize("name", DISCRETE + CONTINUOUS)
def test_time_at_inverts_log_snr(name):
    schedule = make_schedule(name)
    t = some_times(schedule)
    torch.testing.assert_close(schedule.time_at(schedule.log_snr(t)), t, rtol=0, atol=1e-9)
    beyond = schedule.time_at(torch.tensor([1e3, -1e3]))
    assert beyond.tolist() == [t[0], t[-1]]


def test_time_at_takes_the_nearest_discrete_time():
    schedule = make_schedule("cosine", 50)
    log_snr = schedule.log_snr(torch.arange(50))
    wanted = torch.linspace(-9, 9, 97, dtype=torch.float64)
    nearest = (wanted[:, None] - log_snr[None]).abs().argmin(1)
    assert torch.equal(schedule.time_at(wanted), nearest)


@pytest.mark.parametrize("name", DISCRETE + CONTINUOUS)
def test_networks_see_times_up_to_1000(name):
    schedule = make_schedule(name)
    seen = schedule.net_time(some_times(schedule))
    assert seen.dtype == torch.float32
    assert seen.min() == 0 and seen.max() == (999 if schedule.timesteps else 1000)


@pytest.mark.parametrize("timesteps", [1, 2, 3])
@pytest.mark.parametrize("name", DISCRETE)
def test_very_short_schedules_stay_finite(name, timesteps):
    """Stretched betas would pass 1 here; unclipped they give NaN."""
    schedule = make_schedule(name, timesteps)
    t = torch.arange(timesteps)
    assert schedule.log_snr(t).isfinite().all()
    assert torch.equal(schedule.time_at(schedule.log_snr(t)), t)


@pytest.mark.parametrize("name", DISCRETE + CONTINUOUS)
def test_config_survives_json(name):
    options = {"beta_end": 0.3} if name.endswith("linear") and name in DISCRETE else {}
    schedule = make_schedule(name, 20, **options)
    again = Schedule.from_config(json.loads(json.dumps(schedule.to_config())))
    t = some_times(schedule)
    assert torch.equal(schedule.log_snr(t), again.log_snr(t))
    assert again.to_config() == schedule.to_config()


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(name="cosin"), ValueError, "'cosine'.*got 'cosin'"),
        (dict(name="cosine", timesteps=0), ValueError, "timesteps: expected at least 1, got 0"),
        (dict(name="cosine", timesteps=None), TypeError, "timesteps: expected an int"),
        (dict(name="cosine", timesteps=10.0), TypeError, "timesteps: expected an int"),
        (dict(name="cosine", beta_end=0.1), TypeError, "beta_end: not an option of schedule 'cosine'"),
        (dict(name="linear", beta_end=1.5), ValueError, "beta_end: expected .* between 0 and 1, got 1.5"),
        (dict(name="continuous_cosine", log_snr_min=3.0, log_snr_max=1.0), ValueError, "log_snr_min"),
        (dict(name="continuous_cosine", shift=math.nan), ValueError, "shift: expected a finite number"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        make_schedule(**arguments)
