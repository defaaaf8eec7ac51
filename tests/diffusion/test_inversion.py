"""DDIM backwards, from data to noise, against the probability flow of Gaussian data in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from tests.support.gaussian_data import DEVIATION, MEAN, exact_net

SEEDS = torch.tensor([5])


def inversion(prediction: str, name: str, steps: int, refine: int = 0) -> tuple[Tensor, Tensor]:
    """Largest distance of x_T from its closed form, and of the sample that it leads back to from x0."""
    diffusion = GaussianDiffusion(make_schedule(name), prediction)
    net = exact_net(diffusion.schedule, prediction)
    x0 = MEAN + DEVIATION * torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(1, 8)
    x_T = diffusion.invert(net, x0, steps=steps, refine=refine)
    # The probability flow keeps every quantile of the data.
    t = diffusion.times(steps)[0]
    alpha, sigma = diffusion.schedule.alpha(t), diffusion.schedule.sigma(t)
    wanted = alpha * MEAN + ((alpha * DEVIATION) ** 2 + sigma**2).sqrt() * (x0 - MEAN) / DEVIATION
    options = dict(seeds=SEEDS, steps=steps, x_T=x_T, clip=None, dtype=torch.float64)
    back = diffusion.sample(net, (1, 8), **options)
    return (x_T - wanted).abs().max(), (back - x0).abs().max()


@pytest.mark.parametrize("name", ["cosine", "continuous_cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_inversion_is_exact_in_the_limit_of_many_steps(prediction, name):
    """First order: four times the steps, a quarter of the distance from the closed form, and of the way
    back."""
    (few, few_back), (many, many_back) = (inversion(prediction, name, steps) for steps in (125, 500))
    assert many < 0.01 and 3 < few / many < 5
    assert many_back < 0.02 and few_back / many_back > 2.5


@pytest.mark.parametrize("name", ["cosine", "continuous_cosine"])
def test_refined_inversion_leads_back_with_few_steps(name):
    plain = inversion("v_prediction", name, 10)[1]
    refined = inversion("v_prediction", name, 10, refine=8)[1]
    assert refined < plain / 10


def test_inversion_refuses():
    diffusion = GaussianDiffusion(make_schedule("cosine"))
    with pytest.raises(ValueError, match="refine: expected an int of at least 0, got -1"):
        diffusion.invert(lambda x, time: x, torch.zeros(1, 2), steps=4, refine=-1)
    with pytest.raises(ValueError, match="times: expected .steps >= 2."):
        diffusion.invert(lambda x, time: x, torch.zeros(1, 2), steps=1)
