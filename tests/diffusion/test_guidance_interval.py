"""Guidance only in an interval of noise levels: which steps have it, and what the other steps compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.diffusion.names import check_guidance_interval
from dalle2_fast.diffusion.sampler_tables import guided_steps

SAMPLERS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm++", 0.0)]
SHAPE = (3, 2, 4, 4)
SEEDS = torch.tensor([5, -7, 2**62 + 11])
STEPS = 6
EVERYWHERE = (-100.0, 100.0)
MIDDLE = (-5.0, 2.0)  # log-SNR; the steps of `process` are at -19.8, -2.3, -0.7, 0.6, 2.2 and 10.1
INSIDE = [False, True, True, True, False, False]


def process() -> GaussianDiffusion:
    return GaussianDiffusion(make_schedule("cosine"), "sample")


class Rows:
    """A network that counts its rows: with guidance it returns the unconditional ones as well."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def conditional(self, x: Tensor, time: Tensor) -> Tensor:
        self.seen.append(len(x))
        return torch.sin(3 * x) + (time / 1000).reshape(-1, *([1] * (x.dim() - 1)))

    def guided(self, x: Tensor, time: Tensor) -> Tensor:
        without = torch.cos(2 * x)
        with_it = self.conditional(x, time)
        self.seen[-1] *= 2
        return torch.cat([with_it, without])


def sample(interval: tuple[float, float] | None, **options) -> tuple[Tensor, list[int]]:
    """A guided sample, and the rows that the network sees in every step."""
    rows = Rows()
    given = dict(seeds=SEEDS, steps=STEPS, guidance=3.0, conditional_net=rows.conditional) | options
    return process().sample(rows.guided, SHAPE, guidance_interval=interval, **given), rows.seen


def reference(inside: list[bool], **options) -> Tensor:
    """As `sample`, but always with guidance: outside, both halves are conditional and cancel exactly."""
    rows, times = Rows(), process().times(STEPS)
    steps = {float(t): step for step, t in enumerate(times)}

    def net(x: Tensor, time: Tensor) -> Tensor:
        if inside[steps[time[0].item()]]:
            return rows.guided(x, time)
        return torch.cat([rows.conditional(x, time)] * 2)

    return process().sample(net, SHAPE, **dict(seeds=SEEDS, steps=STEPS, guidance=3.0) | options)


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_an_interval_that_covers_every_step_is_none(sampler, eta):
    """Catches a changed bit where the setting is not used, and an interval that leaves out an end step."""
    options = dict(sampler=sampler, eta=eta, guidance_rescale=0.5)
    (all_steps, seen), (covered, seen_covered) = (sample(i, **options) for i in (None, EVERYWHERE))
    assert torch.equal(covered, all_steps) and seen == seen_covered == [6] * STEPS


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_an_empty_interval_is_no_guidance(sampler, eta):
    """Catches unconditional rows that are computed and not used, and a weight or a rescaling that still
    applies."""
    options = dict(sampler=sampler, eta=eta)
    nowhere, seen = sample((0.5, 0.5), guidance_rescale=0.5, **options)
    without = process().sample(Rows().conditional, SHAPE, seeds=SEEDS, steps=STEPS, **options)
    assert torch.equal(nowhere, without) and seen == [3] * STEPS


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
@pytest.mark.parametrize("guidance", [3.0, torch.tensor([3.0, 0.0, 1.5])])
def test_steps_inside_are_guided_and_steps_outside_conditional(sampler, eta, guidance):
    """Catches another step that is guided, and a multistep sampler that loses the x0 of the step before."""
    options = dict(sampler=sampler, eta=eta, guidance=guidance)
    made, seen = sample(MIDDLE, **options)
    assert seen == [6 if guided else 3 for guided in INSIDE]
    assert torch.equal(made, reference(INSIDE, **options))
    assert not torch.equal(made, reference([True] * STEPS, **options))


def test_the_border_belongs_to_the_interval_at_its_low_end_only():
    """Catches < in place of <=, and the other way round: two adjacent intervals share no step."""
    schedule = make_schedule("continuous_log_linear", log_snr_min=-6.0, log_snr_max=6.0)
    times = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)  # log-SNR -6, -3, 0, 3
    assert guided_steps(schedule, times, (-3.0, 3.0)) == [False, True, True, False]
    assert guided_steps(schedule, times, (-6.0, -3.0)) == [True, False, False, False]
    assert guided_steps(schedule, times, (0.0, 0.0)) == [False] * 4
    assert guided_steps(schedule, times, None) == [True] * 4


def test_a_learned_variance_is_that_of_the_conditional_rows():
    """Catches an output of 2C channels that is taken for 2B rows outside the interval."""
    diffusion = GaussianDiffusion(make_schedule("cosine"), "sample", variance="learned_range")

    def conditional(x: Tensor, time: Tensor) -> Tensor:
        return torch.cat([torch.sin(x), torch.cos(x)], dim=1)

    def guided(x: Tensor, time: Tensor) -> Tensor:
        return conditional(torch.cat([x, x]), time)

    for sampler in ("ddpm", "dpm++"):
        options = dict(seeds=SEEDS, steps=4, sampler=sampler)
        plain = diffusion.sample(conditional, SHAPE, **options)
        half = diffusion.sample(
            guided, SHAPE, guidance=3.0, guidance_interval=MIDDLE, conditional_net=conditional, **options
        )
        torch.testing.assert_close(half, plain, rtol=0, atol=1e-6)


def test_inpainting_and_a_late_start_count_the_same_steps():
    """Catches steps that are counted from the start of the run, or once per repetition of a segment."""
    known, mask = torch.zeros(SHAPE), torch.tensor([[[[True, False, True, False]] * 4]] * 3)
    options = dict(known=known, mask=mask, resample=2, jump=2, sampler="ddim")
    made, seen = sample(MIDDLE, **options)
    assert seen == [3, 6, 3, 6, 6, 6, 6, 6, 3, 3, 3, 3]
    assert torch.equal(made, reference(INSIDE, **options))
    late, seen = sample(MIDDLE, x_T=torch.ones(SHAPE), start=3)
    assert seen == [6, 3, 3]
    assert torch.equal(late, reference(INSIDE, x_T=torch.ones(SHAPE), start=3))


def test_the_last_step_may_have_another_network():
    """Catches a last network that is asked for unconditional rows where its step has no guidance."""
    made, seen = sample(MIDDLE, last_net=lambda x, time: torch.zeros_like(x))
    assert seen == [3, 6, 6, 6, 3] and torch.equal(made, torch.zeros(SHAPE))


def test_inversion_leaves_out_the_same_steps():
    """Catches an inversion with guidance in other steps than the sampling that leads back."""
    rows, x0 = Rows(), torch.linspace(-0.5, 0.5, 96).reshape(SHAPE)
    options = dict(steps=STEPS, guidance=3.0, refine=1)
    x_T = process().invert(
        rows.guided, x0, guidance_interval=MIDDLE, conditional_net=rows.conditional, **options
    )
    # The steps backwards: state 0 has no call of its own, and each refinement is one more.
    assert rows.seen == [3, 3, 3, 3, 6, 6, 6, 6, 6, 6, 3]
    times = process().schedule.net_time(process().times(STEPS)).tolist()

    def net(x: Tensor, time: Tensor) -> Tensor:
        inside = times.index(time[0].item()) in (1, 2, 3)
        return rows.guided(x, time) if inside else torch.cat([rows.conditional(x, time)] * 2)

    assert torch.equal(x_T, process().invert(net, x0, **options))


def test_without_guidance_the_interval_changes_nothing():
    """Catches a checkpoint's interval that breaks a call without guidance."""
    net = Rows().conditional
    options = dict(seeds=SEEDS, steps=STEPS)
    made = process().sample(net, SHAPE, guidance_interval=MIDDLE, **options)
    assert torch.equal(made, process().sample(net, SHAPE, **options))


@pytest.mark.parametrize(
    "interval, error, says",
    [
        (3.0, TypeError, r"expected two numbers \(low, high\) or None, got 3.0"),
        ("-4", TypeError, "expected two numbers"),
        ((1.0,), TypeError, "expected two numbers"),
        ((0, True), TypeError, "expected two numbers"),
        ((None, 1.0), TypeError, "expected two numbers"),
        ((1.0, -1.0), ValueError, r"expected finite numbers .* low <= high, got \(1.0, -1.0\)"),
        ((float("-inf"), 0.0), ValueError, "expected finite numbers"),
        ((0.0, float("nan")), ValueError, "expected finite numbers"),
    ],
)
def test_what_is_no_interval_is_refused(interval, error, says):
    """Catches an interval that silently has no step, or that JSON cannot hold."""
    with pytest.raises(error, match=f"guidance_interval: {says}"):
        sample(interval)
    with pytest.raises(error, match=f"prior_guidance_interval: {says}"):
        check_guidance_interval(interval, "prior_guidance_interval")


def test_the_network_of_the_other_steps_is_asked_for():
    """Catches 'NoneType is not callable' in the middle of a run."""
    with pytest.raises(ValueError, match="conditional_net: expected a network for the steps outside"):
        sample(MIDDLE, conditional_net=None)
    assert sample(EVERYWHERE, conditional_net=None)[1] == [6] * STEPS
