"""Known pixels while sampling: kept to the bit, seen at the right noise, and the rest drawn from the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.diffusion.inpainting import resampling_order
from dalle2_fast.seeds import derived_seeds
from tests.support.gaussian_data import DEVIATION, MEAN, exact_net

SAMPLERS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm++", 0.0), ("consistency", 0.0)]
SEEDS = torch.tensor([5, -7, 2**62 + 11])
SHAPE = (3, 2, 4, 4)
KNOWN = torch.linspace(-1, 1, 96).reshape(SHAPE)
MASK = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
MASK[..., 2:] = True


def wavy(x: Tensor, time: Tensor) -> Tensor:
    return torch.sin(3 * x) + (time / 1000).reshape(-1, *([1] * (x.dim() - 1)))


def sample(net=wavy, prediction: str = "sample", name: str = "cosine", shape=SHAPE, **options) -> Tensor:
    diffusion = GaussianDiffusion(make_schedule(name), prediction)
    return diffusion.sample(net, shape, **(dict(seeds=SEEDS[: shape[0]], steps=6) | options))


@pytest.mark.parametrize("resample", [1, 3])
@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_known_pixels_come_out_to_the_bit_and_the_rest_is_new(sampler, eta, resample):
    options = dict(sampler=sampler, eta=eta, resample=resample, jump=2)
    made = sample(known=KNOWN, mask=MASK, **options)
    kept = ~MASK.expand(SHAPE)
    assert torch.equal(made[kept], KNOWN[kept])
    assert (made[~kept] - KNOWN[~kept]).abs().min() > 1e-4
    everything = sample(known=KNOWN, mask=torch.ones_like(MASK), sampler=sampler, eta=eta)
    assert torch.equal(everything, sample(sampler=sampler, eta=eta))  # nothing is known: as without a mask
    nothing = sample(known=KNOWN, mask=torch.zeros_like(MASK), sampler=sampler, eta=eta)
    assert torch.equal(nothing, KNOWN)


def test_the_network_sees_known_pixels_at_the_right_noise():
    """A known part that is too clean, or too noisy, is what makes seams."""
    shape, seen = (1, 1, 20_000), []
    known = torch.full(shape, 0.7, dtype=torch.float64)
    mask = torch.zeros(shape, dtype=torch.bool)
    diffusion = GaussianDiffusion(make_schedule("cosine"), "sample")

    def net(x: Tensor, time: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    options = dict(known=known, mask=mask, dtype=torch.float64, resample=2, jump=3, sampler="ddpm")
    diffusion.sample(net, shape, seeds=SEEDS[:1], steps=5, **options)
    order = [step for step, _ in resampling_order(0, 5, 2, 3)]
    assert order == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4] and len(seen) == 10
    times = diffusion.times(5)
    for step, x in zip(order, seen, strict=True):
        alpha, sigma = diffusion.schedule.alpha(times[step]), diffusion.schedule.sigma(times[step])
        assert x.mean().item() == pytest.approx(0.7 * alpha.item(), abs=0.03)
        assert x.std().item() == pytest.approx(sigma.item(), rel=0.03)
    noises = torch.stack([x[0, 0] for x in seen])
    # Every step and every repetition has different noise.
    assert (torch.corrcoef(noises) - torch.eye(10)).abs().max() < 0.04


@pytest.mark.parametrize("name", ["cosine", "continuous_cosine"])
def test_resampling_keeps_the_distribution(name):
    """Way back and forth of the right variance: the unknown part is still drawn from the data."""
    diffusion = GaussianDiffusion(make_schedule(name), "sample")
    shape = (2, 1, 3000)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., :1000] = False
    made = diffusion.sample(
        exact_net(diffusion.schedule, "sample"), shape, seeds=SEEDS[:2], steps=200, sampler="ddpm", clip=None,
        known=torch.zeros(shape), mask=mask, resample=2, jump=30,
    )  # fmt: skip
    new = made[mask]
    assert new.mean().item() == pytest.approx(MEAN, abs=0.04)
    assert new.std().item() == pytest.approx(DEVIATION, abs=0.04)


def test_a_seed_is_a_picture_whatever_the_batch():
    options = dict(sampler="ddpm", resample=2, jump=2)
    together = sample(known=KNOWN, mask=MASK, **options)
    diffusion = GaussianDiffusion(make_schedule("cosine"), "sample")
    for i in range(3):
        alone = diffusion.sample(
            wavy, (1, *SHAPE[1:]), seeds=SEEDS[i : i + 1], steps=6, known=KNOWN[i : i + 1], mask=MASK,
            **options,
        )  # fmt: skip
        assert torch.equal(alone[0], together[i])


def test_a_start_in_the_middle_repaints_from_there():
    diffusion = GaussianDiffusion(make_schedule("cosine"), "sample")
    calls = []
    x = diffusion.add_noise(KNOWN, diffusion.times(6)[2].expand(3), seeds=SEEDS)
    made = sample(
        lambda x, time: calls.append(time[0].item()) or wavy(x, time),
        x_T=x, start=2, known=KNOWN, mask=MASK, resample=2, jump=3,
    )  # fmt: skip
    assert calls == [float(t) for t in diffusion.times(6)[[2, 3, 4, 2, 3, 4, 5, 5]]]
    kept = ~MASK.expand(SHAPE)
    assert torch.equal(made[kept], KNOWN[kept])


def test_masks_of_numbers_and_of_one_per_channel():
    made = sample(known=KNOWN, mask=MASK)
    assert torch.equal(sample(known=KNOWN, mask=MASK.float()), made)
    assert torch.equal(sample(known=KNOWN, mask=MASK.expand(SHAPE)), made)


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(mask=MASK), ValueError, "known: expected the data to keep, because mask"),
        (dict(resample=2), ValueError, "known: expected the data to keep"),
        (dict(known=KNOWN), TypeError, "mask: expected a tensor with 1 where to repaint, got NoneType"),
        (dict(known=KNOWN[:1], mask=MASK), ValueError, r"known: expected \(3, 2, 4, 4\), got \(1, 2, 4, 4\)"),
        (dict(known=KNOWN, mask=MASK[..., :3]), ValueError, r"mask: .*broadcasts to \(3, 2, 4, 4\), got"),
        (dict(known=KNOWN, mask=MASK * 0.5), ValueError, r"mask: expected 0 \(keep\) and 1 \(repaint\) only"),
        (dict(known=KNOWN, mask=MASK, resample=0), ValueError, "resample: expected an int of at least 1"),
        (dict(known=KNOWN, mask=MASK, jump=1.5), ValueError, "jump: expected an int of at least 1, got 1.5"),
    ],
)
def test_bad_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        sample(**options)


def test_repetitions_have_derived_seeds():
    assert torch.equal(derived_seeds(SEEDS, 0), SEEDS)
    all_seeds = torch.cat([derived_seeds(SEEDS, again) for again in range(50)])
    assert len(set(all_seeds.tolist())) == 150
