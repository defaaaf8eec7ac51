"""The loss of distillation, on data whose flow is known. Each test names the fault it would catch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.training.distillation.loss import (
    deterministic_step,
    distillation_loss,
    earlier_times,
    gap,
    training_times,
)
from dalle2_fast.training.ema import ExponentialMovingAverage
from tests.support.gaussian_data import DEVIATION, MEAN, best_x0, end_of_flow, exact_net

SCHEDULES = ("cosine", "continuous_cosine")


def process(name: str, prediction: str = "v_prediction") -> GaussianDiffusion:
    return GaussianDiffusion(make_schedule(name), prediction)


def exact_teacher(diffusion: GaussianDiffusion):
    """The x0 of the optimal network."""
    net = exact_net(diffusion.schedule, "sample")
    return lambda x, t: net(x, diffusion.schedule.net_time(t))


def exact_student(diffusion: GaussianDiffusion):
    """The end of the flow, which is what a perfect student answers."""

    def student(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (f(t)[:, None] for f in (diffusion.schedule.alpha, diffusion.schedule.sigma))
        return end_of_flow(x.double(), alpha, sigma).to(x.dtype)

    return student


class Linear(nn.Module):
    """x -> gain(time) x + offset(time), each linear between 33 times: enough for Gaussian data."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(34, 2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        place = time / 1000 * 32
        row = place.long().clamp(max=32)
        share = (place - row)[:, None]
        gain, offset = torch.lerp(self.rows[row], self.rows[row + 1], share).chunk(2, dim=1)
        return gain * x + offset


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_distilled_student_draws_the_data(name):
    """Catches: a student that learns the mean of the data in place of a sample (the teacher's x0 at the
    noisiest time, with deviation 0), a target at the wrong time, a step of another flow."""
    diffusion, student = process(name), Linear()
    teacher, generator = exact_teacher(diffusion), torch.Generator().manual_seed(1)
    iterations, rate = 600, 1e-2
    average = ExponentialMovingAverage(student, 0.995)
    optimizer = torch.optim.Adam(student.parameters(), rate)

    def x0_of_student(x: Tensor, t: Tensor) -> Tensor:
        return diffusion.predict_x0(x, t, student(x, diffusion.schedule.net_time(t)))

    for step in range(iterations):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / iterations)
        x0 = MEAN + DEVIATION * torch.randn(256, 4, generator=generator)
        t = training_times(diffusion, 256, 2, generator, x0.device)
        noise = torch.randn(x0.shape, generator=generator)
        options = dict(t=t, noise=noise, g=gap(step / iterations, 0.0), clip=None)
        loss = distillation_loss(diffusion, x0_of_student, teacher, x0, **options).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(student)
    with average.applied_to(student):
        for steps in (1, 2):
            options = dict(seeds=torch.arange(200), steps=steps, sampler="consistency", clip=None)
            drawn = diffusion.sample(student, (200, 50), **options)
            assert drawn.mean().item() == pytest.approx(MEAN, abs=0.08)
            assert drawn.std().item() == pytest.approx(DEVIATION, rel=0.15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_phase_is_the_teachers_x0(name):
    """Catches: a phase for guidance whose target is anything but the teacher's answer at the same place."""
    diffusion = process(name)
    t = diffusion.times(6, "trailing")
    x0, noise = torch.randn(2, 6, 8, dtype=torch.float64)
    answers = []

    def student(x: Tensor, t: Tensor) -> Tensor:
        answers.append(x)
        return torch.zeros_like(x)

    teacher = exact_teacher(diffusion)
    loss = distillation_loss(diffusion, student, teacher, x0, t=t, noise=noise, g=1.0, clip=None)
    assert len(answers) == 1, "no second answer of the student is needed"
    target = teacher(diffusion.add_noise(x0, t, noise), t)
    weight = (1 + diffusion.schedule.log_snr(t).exp()).sqrt().clamp(max=100)
    rms = target.square().mean(1).sqrt()
    torch.testing.assert_close(loss, (weight * rms).float(), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exact_student_has_a_loss_that_vanishes_with_the_steps(name):
    """Catches: a flow that does not lead where DDIM leads; the error of a first-order step falls with it."""
    diffusion = process(name)
    t = diffusion.times(64, "trailing")
    x0, noise = torch.randn(2, 64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = []
    for g in (0.5, 0.125, 1 / 64):
        losses.append(
            distillation_loss(
                diffusion, exact_student(diffusion), exact_teacher(diffusion), x0, t=t, noise=noise, g=g,
                clip=None,
            ).mean().item()
        )  # fmt: skip
    assert losses[0] > 2 * losses[1] > 4 * losses[2] and losses[2] < 0.02


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_end_earlier_and_the_last_ones_at_the_data(name):
    """Catches: a step of no length, with which the student would be its own target for ever."""
    diffusion = process(name)
    t = diffusion.times(200, "trailing")
    t = torch.cat([t, torch.zeros_like(t[:1])])
    for g in (1.0, 0.5, 1 / 64):
        r, at_data = earlier_times(diffusion, t, g)
        assert (r < t)[~at_data].all() and (r >= 0).all()
        assert at_data.all() if g == 1.0 else at_data[-1] and not at_data[0]
        assert (at_data.int().diff() >= 0).all(), "the steps that end at the data are those of little noise"
    r, at_data = earlier_times(diffusion, t[:1], 1 / 64)
    angle, shorter = (
        torch.atan2(diffusion.schedule.sigma(each), diffusion.schedule.alpha(each)).item()
        for each in (t[:1], r)
    )
    assert shorter == pytest.approx(angle * (1 - 1 / 64), rel=1e-3), "one step leaves pure noise"


def test_the_deterministic_step_is_ddims():
    """Catches: a step that mixes x_t and x0 in other proportions than the sampler."""
    diffusion = process("cosine")
    t, r = torch.tensor([800]), torch.tensor([700])
    x_t, x0 = torch.randn(2, 1, 8, dtype=torch.float64)
    alpha, sigma = diffusion.schedule.alpha(t), diffusion.schedule.sigma(t)
    noise = (x_t - alpha * x0) / sigma
    expected = diffusion.add_noise(x0, r, noise)
    torch.testing.assert_close(deterministic_step(diffusion, x_t, x0, t, r), expected, rtol=1e-6, atol=1e-6)


def test_targets_have_no_gradient_and_are_clipped():
    """Catches: a gradient through the target, which lets the student move it, and values that no sampler
    with a bound returns."""
    diffusion = process("cosine")
    shift = torch.tensor(3.0, requires_grad=True)
    seen = []

    def student(x: Tensor, t: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return torch.zeros_like(x) + shift

    x0, t = torch.zeros(2, 4), torch.tensor([700, 900])
    teacher = lambda x, t: torch.full_like(x, 5.0)  # noqa: E731
    noise = torch.zeros(2, 4)
    loss = distillation_loss(diffusion, student, teacher, x0, t=t, noise=noise, g=1 / 64, clip=1.0)
    weight = (1 + diffusion.schedule.log_snr(t).exp()).sqrt()
    torch.testing.assert_close(loss, (2 * weight).float(), rtol=1e-3, atol=1e-3)  # 3 - the bound
    loss.sum().backward()
    assert shift.grad.item() == pytest.approx(weight.sum().item(), rel=1e-3)
    assert seen == [False, True]


def test_the_gap_falls_from_one():
    """Catches: a schedule that ends before or after the training."""
    values = [gap(progress, 0.25) for progress in torch.linspace(0, 1, 41).tolist()]
    assert values[:11] == [1.0] * 11 and values[-1] == pytest.approx(1 / 64)
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))
    assert gap(0.0, 0.0) == 1.0 and math.isclose(gap(1.0, 0.0), 1 / 64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_quarter_of_the_times_are_those_of_the_sampler(name):
    """Catches: a student that is never trained where its sampler calls it."""
    diffusion, generator = process(name), torch.Generator().manual_seed(0)
    times = training_times(diffusion, 400, 4, generator, torch.device("cpu"))
    wanted = diffusion.times(4, "trailing").tolist()
    assert set(times[::4].tolist()) == set(wanted)
    assert len(set(times.tolist())) > 100


def test_the_exact_x0_differs_from_the_end_of_the_flow():
    """The two functions of the data that the tests above compare are not the same one."""
    assert best_x0(2.0, 0.1, 0.99) != pytest.approx(end_of_flow(2.0, 0.1, 0.99), abs=0.1)
