"""The samplers' coefficient tables: against the papers' formulas, and on data of known distribution."""

from __future__ import annotations

import math

import pytest
import torch

from dalle2_fast.diffusion import inversion_table, make_schedule, sampler_table, step_times
from tests.support.gaussian_data import DEVIATION, MEAN, best_x0, end_of_flow

ALPHA, SIGMA, A, B, C, STD, LOG_MIN, LOG_MAX = range(8)
SCHEDULES = ("cosine", "linear", "continuous_cosine", "continuous_log_linear")
EXACT = dict(rtol=1e-9, atol=1e-11)


def build(name: str, steps: int, sampler: str, **options) -> torch.Tensor:
    schedule = make_schedule(name)
    return sampler_table(schedule, step_times(schedule, steps), sampler, **options)


def ends(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma where each step ends; the last ends on the data."""
    one = table.new_ones(1)
    return torch.cat([table[1:, ALPHA], one]), torch.cat([table[1:, SIGMA], 0 * one])


# -- times ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 7, 25, 64, 250, 1000])
def test_strided_times_are_improved_ddpms(steps):
    times = step_times(make_schedule("cosine"), steps)
    stride, position, wanted = 999 / (steps - 1), 0.0, []
    for _ in range(steps):  # its space_timesteps, one section
        wanted.append(round(position))
        position += stride
    assert times.flip(0).tolist() == wanted


def test_one_step_starts_at_the_noise():
    assert step_times(make_schedule("cosine"), 1).tolist() == [999]
    assert step_times(make_schedule("continuous_cosine"), 4).tolist() == [1, 0.75, 0.5, 0.25]


# -- formulas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1000, 50])
def test_ddpm_is_the_posterior_of_the_strided_process(steps):
    """2006.11239 equations 6 and 7 with the betas of the kept times, as improved DDPM respaces them."""
    schedule = make_schedule("cosine")
    kept = (1 - schedule.betas).cumprod(0)[step_times(schedule, steps).flip(0)]
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    beta = 1 - kept / before
    a = (1 - beta).sqrt() * (1 - before) / (1 - kept)
    b = before.sqrt() * beta / (1 - kept)
    variance = beta * (1 - before) / (1 - kept)
    small = build("cosine", steps, "ddpm").flip(0)
    large = build("cosine", steps, "ddpm", variance="fixed_large").flip(0)
    torch.testing.assert_close(small[:, A], a, **EXACT)
    torch.testing.assert_close(small[:, B], b, **EXACT)
    torch.testing.assert_close(small[:, STD], variance.sqrt(), **EXACT)
    torch.testing.assert_close(large[1:, STD], beta[1:].sqrt(), **EXACT)
    torch.testing.assert_close(small[1:, LOG_MIN], variance[1:].log(), **EXACT)
    torch.testing.assert_close(small[0, LOG_MIN], variance[1].log(), **EXACT)  # clipped: the log is -inf
    torch.testing.assert_close(small[:, LOG_MAX], beta.log(), **EXACT)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_is_its_equation_12(name, eta):
    table = build(name, 20, "ddim", eta=eta)
    alpha, sigma = table[:, ALPHA], table[:, SIGMA]
    alpha_after, sigma_after = ends(table)
    # Equation 16, in alpha^2 and sigma^2.
    std = eta * (sigma_after / sigma) * (1 - alpha**2 / alpha_after**2).sqrt()
    x0, noise = torch.randn(2, 20, dtype=torch.float64)
    x = alpha * x0 + sigma * noise
    wanted = alpha_after * x0 + (sigma_after**2 - std**2).clamp(min=0).sqrt() * noise
    torch.testing.assert_close(table[:, A] * x + table[:, B] * x0, wanted, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(table[:, STD], std, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_with_eta_1_is_ddpm(name):
    columns = [A, B, C, STD]
    ddim, ddpm = build(name, 30, "ddim", eta=1.0), build(name, 30, "ddpm")
    torch.testing.assert_close(ddim[:, columns], ddpm[:, columns], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_dpm_is_algorithm_2_of_its_paper(name):
    table = build(name, 12, "dpm++")
    lam = (table[:, ALPHA] / table[:, SIGMA]).log()
    alpha_after, sigma_after = ends(table)
    x, x0, before = torch.randn(3, 12, dtype=torch.float64)
    for i in range(11):
        h = lam[i + 1] - lam[i]
        guess = x0[i]
        if i > 0:
            r = (lam[i] - lam[i - 1]) / h
            r = max(r, 1)
            guess = (1 + 1 / (2 * r)) * x0[i] - 1 / (2 * r) * before[i]
        wanted = sigma_after[i] / table[i, SIGMA] * x[i] - alpha_after[i] * torch.expm1(-h) * guess
        got = table[i, A] * x[i] + table[i, B] * x0[i] + table[i, C] * before[i]
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_sampler_lands_on_x0_exactly(name, steps):
    for sampler, options in [("ddpm", {}), ("ddpm", dict(variance="learned_range")), ("ddim", dict(eta=1.0)),
                             ("ddim", {}), ("dpm++", {}), ("consistency", {})]:  # fmt: skip
        table = build(name, steps, sampler, **options)
        assert table.shape == (steps, 8) and table.isfinite().all()
        assert table[-1, [A, B, C, STD]].tolist() == [0, 1, 0, 0]
        assert table[0, C] == 0


def test_the_table_rounds_well_to_float32():
    """Written as 1 - exp or 1 - alpha^2 the coefficients would lose digits near the data."""
    for sampler in ("ddpm", "ddim", "dpm++", "consistency"):
        table = build("continuous_log_linear", 500, sampler)
        assert ((table.float().double() - table).abs() <= 6e-8 * table.abs()).all()


# -- known distributions --------------------------------------------------------------------------------


def moments(table: torch.Tensor) -> tuple[float, float]:
    """Mean and deviation of what the table makes of noise, with the exact network for MEAN and DEVIATION.

    Everything is linear and normal, so that they follow exactly, without drawing: those of the pair
    (x, previous x0) are carried along.
    """
    mean, mean_before, variance, covariance, variance_before = 0.0, 0.0, 1.0, 0.0, 0.0
    for alpha, sigma, a, b, c, std, _, _ in table.tolist():
        offset = best_x0(0.0, alpha, sigma)
        gain = best_x0(1.0, alpha, sigma) - offset
        keep = a + b * gain
        mean, mean_before = keep * mean + c * mean_before + b * offset, gain * mean + offset
        variance, covariance, variance_before = (
            keep**2 * variance + 2 * keep * c * covariance + c**2 * variance_before + std**2,
            gain * (keep * variance + c * covariance),
            gain**2 * variance,
        )
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "sampler, steps, options, tolerance",
    [
        ("ddpm", 1000, {}, 1e-2),
        ("ddpm", 1000, dict(variance="fixed_large"), 1e-2),
        ("ddim", 1000, {}, 4e-3),
        ("ddim", 1000, dict(eta=0.5), 2e-2),
        ("dpm++", 1000, {}, 2e-3),
        ("dpm++", 50, {}, 1e-2),
    ],
)
def test_samplers_reach_the_distribution_of_the_data(name, sampler, steps, options, tolerance):
    mean, deviation = moments(build(name, steps, sampler, **options))
    assert mean == pytest.approx(MEAN, abs=tolerance)
    assert deviation == pytest.approx(DEVIATION, rel=tolerance)


def error_of_flow(name: str, steps: int, sampler: str) -> float:
    """How far a deterministic sampler's map x_T -> x0 is from the exact probability flow's, at x_T = 1."""
    table = build(name, steps, sampler).tolist()
    alpha, sigma = table[0][:2]
    truth = MEAN + DEVIATION * (1 - alpha * MEAN) / math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)
    x, before = 1.0, 0.0
    for alpha, sigma, a, b, c, *_ in table:
        x0 = best_x0(x, alpha, sigma)
        x, before = a * x + b * x0 + c * before, x0
    return abs(x - truth)


def test_orders_of_convergence():
    """DDIM is of first order, DPM-Solver++(2M) of second: a wrong r or sign in it gives first order."""
    for sampler, order in (("ddim", 1), ("dpm++", 2)):
        coarse, fine = (error_of_flow("continuous_log_linear", steps, sampler) for steps in (128, 512))
        assert math.log(coarse / fine) / math.log(4) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("steps", [10, 16, 25, 50])
@pytest.mark.parametrize("name", SCHEDULES)
def test_dpm_beats_ddim_at_few_steps(name, steps):
    """Unbounded extrapolation over the long last steps makes it worse than DDIM on discrete schedules."""
    assert error_of_flow(name, steps, "dpm++") < 0.5 * error_of_flow(name, steps, "ddim")


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 999, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_spacing_in_log_snr(name, steps):
    """Discrete times must stay apart where the schedule is steep, or a step has no length."""
    schedule = make_schedule(name)
    times = step_times(schedule, steps, "log_snr")
    first, last = (999, 0) if schedule.timesteps else (1.0, 0.0)
    assert len(times) == steps and times[0] == first and (times.diff() < 0).all() and times[-1] >= last
    if schedule.timesteps is None and steps > 1:
        sizes = schedule.log_snr(times).diff()
        torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes), rtol=1e-6, atol=0)
    elif steps == 10:
        wanted = torch.linspace(*schedule.log_snr(torch.tensor([999, 0])).tolist(), steps)
        assert times[-1] == 0 and (schedule.log_snr(times) - wanted).abs().median() < 0.2


@pytest.mark.parametrize("name", SCHEDULES)
def test_trailing_times_are_nested(name):
    """Catches: a last step of no length at time 0, and times of 2 steps at which a network for 4 steps was
    not trained."""
    schedule = make_schedule(name)
    noisiest = 999 if schedule.timesteps else 1.0
    times = {steps: step_times(schedule, steps, "trailing").tolist() for steps in (1, 2, 4, 7, 999, 1000)}
    assert times[1] == [noisiest] and times[4] == ([999, 749, 499, 249] if schedule.timesteps else
                                                   [1.0, 0.75, 0.5, 0.25])  # fmt: skip
    assert set(times[1]) < set(times[2]) < set(times[4])
    for steps, found in times.items():
        assert len(found) == steps and all(a > b for a, b in zip(found, found[1:], strict=False))
    assert times[1000][-1] == (0 if schedule.timesteps else pytest.approx(0.001))


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_consistency_samples_the_data_with_the_exact_function(name, steps):
    """Catches: noise of the wrong size, and a state that is left in the next one. Its samples are exact for
    any number of steps, up to what the noisiest time still has of the data."""
    schedule = make_schedule(name)
    mean, variance = 0.0, 1.0
    times = step_times(schedule, steps, "trailing")
    for alpha, sigma, a, b, c, std, _, _ in sampler_table(schedule, times, "consistency").tolist():
        offset = end_of_flow(0.0, alpha, sigma)
        gain = end_of_flow(1.0, alpha, sigma) - offset
        assert a == c == 0
        mean, variance = b * (gain * mean + offset), b**2 * gain**2 * variance + std**2
    assert mean == pytest.approx(MEAN, abs=6e-3)
    assert math.sqrt(variance) == pytest.approx(DEVIATION, rel=1e-3)


def test_inversion_runs_ddim_backwards():
    """With x0 known at every time the two tables are inverse to each other."""
    schedule = make_schedule("cosine")
    times = step_times(schedule, 10)
    down, up = sampler_table(schedule, times, "ddim"), inversion_table(schedule, times.flip(0)).flip(0)
    x, x0 = torch.randn(2, 9, dtype=torch.float64)
    below = down[:-1, A] * x + down[:-1, B] * x0
    torch.testing.assert_close(up[:, A] * below + up[:, B] * x0, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(up[:, ALPHA], down[1:, ALPHA])


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(sampler="dpm"), ValueError, "sampler: .* 'dpm[+][+]', 'consistency', got 'dpm'"),
        (dict(sampler="ddim", eta=1.5), ValueError, r"eta: expected a number in \[0, 1\], got 1.5"),
        (dict(sampler="ddpm", eta=0.5), ValueError, "eta: expected 0 because sampler 'ddpm' has none"),
        (dict(sampler="ddpm", variance="small"), ValueError, "variance: expected one of .*, got 'small'"),
        (dict(sampler="ddpm", times=torch.tensor([1, 2])), ValueError, "times: .*strictly falling"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    arguments = dict(times=torch.tensor([5, 2])) | arguments
    with pytest.raises(error, match=words):
        sampler_table(make_schedule("cosine"), **arguments)


@pytest.mark.parametrize("steps", [0, 1001, 2.0, True])
def test_bad_steps_are_named(steps):
    error = ValueError if type(steps) is int else TypeError
    with pytest.raises(error, match="steps: expected"):
        step_times(make_schedule("cosine"), steps)
