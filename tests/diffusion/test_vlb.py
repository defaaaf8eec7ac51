"""The variational bound, against closed formulas on Gaussian data and the likelihood of 256 values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.diffusion.vlb import discretised_normal_nll
from tests.support.gaussian_data import DEVIATION, MEAN, data, exact_net

PREDICTIONS = ("epsilon", "sample", "v_prediction", "edm")


def vlb(prediction: str, timesteps: int, x0: Tensor, **options) -> dict[str, Tensor]:
    schedule = make_schedule("cosine", timesteps)
    process = GaussianDiffusion(schedule, prediction, **options)
    seeds = torch.arange(len(x0))
    return process.vlb_bits_per_dim(exact_net(schedule, prediction), x0, seeds=seeds, clip=None, levels=None)


def test_bound_of_gaussian_data_is_close_above_the_truth():
    """With the exact network and the exact variance, -log2 p(x0) is reached from above as steps are added.

    The exact variance is beta nearly everywhere, which is position 1 of a learned range.
    """
    x0 = data(2, 4, 64)
    truth = (-torch.distributions.Normal(MEAN, DEVIATION).log_prob(x0) / math.log(2)).mean().item()
    gaps = []
    for steps in (4, 20, 100):
        schedule = make_schedule("cosine", steps)
        net = exact_net(schedule, "epsilon")
        process = GaussianDiffusion(schedule, variance="learned_range")
        got = process.vlb_bits_per_dim(
            lambda x, time, net=net: torch.cat([net(x, time), torch.ones_like(x)], dim=1), x0,
            seeds=torch.arange(2), clip=None, levels=None,
        )  # fmt: skip
        gaps.append(got["total"].mean().item() - truth)
    # Drawn noise: the standard error is about 0.01.
    assert gaps[0] > gaps[1] > gaps[2] > -0.03
    assert gaps[2] < 0.03


def test_bound_terms_against_their_expectation():
    """L_t of the exact network in closed form: b^2 times the error of x0, over twice the variance."""
    timesteps = 40
    schedule = make_schedule("cosine", timesteps)
    got = vlb("v_prediction", timesteps, data(2, 4, 64))
    t = torch.arange(1, timesteps)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    alpha_before, sigma_before = schedule.alpha(t - 1), schedule.sigma(t - 1)
    beta = schedule.betas[t]
    error = DEVIATION**2 * sigma**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    variance = beta * sigma_before**2 / sigma**2
    wanted = (alpha_before * beta / sigma**2) ** 2 * error / (2 * variance) / math.log(2)
    torch.testing.assert_close(got["terms"][:, 1:].mean(0), wanted, rtol=0.05, atol=1e-6)
    assert got["terms"].shape == (2, timesteps)
    torch.testing.assert_close(got["total"], got["prior"] + got["terms"].sum(1))
    assert (got["prior"] >= 0).all() and got["prior"].max() < 1e-3


def test_bound_does_not_depend_on_what_is_predicted():
    """DALLE2-pytorch's bound ignores the parametrisation."""
    x0 = data(2, 2, 8)
    totals = [vlb(prediction, 30, x0)["total"] for prediction in PREDICTIONS]
    for other in totals[1:]:
        torch.testing.assert_close(other, totals[0], rtol=1e-6, atol=1e-6)


def test_fixed_variances_are_the_ends_of_the_learned_range():
    x0, seeds = data(2, 2, 8), torch.arange(2)
    schedule = make_schedule("cosine", 30)
    net = exact_net(schedule, "epsilon")
    learned = GaussianDiffusion(schedule, variance="learned_range")
    for variance, position in (("fixed_small", -1.0), ("fixed_large", 1.0)):
        fixed = GaussianDiffusion(schedule, variance=variance).vlb_bits_per_dim(net, x0, seeds=seeds)
        got = learned.vlb_bits_per_dim(
            lambda x, time, position=position: torch.cat([net(x, time), torch.full_like(x, position)], 1), x0,
            seeds=seeds,
        )  # fmt: skip
        torch.testing.assert_close(got["terms"][:, 1:], fixed["terms"][:, 1:])


def test_discretised_likelihood_sums_to_one():
    """Over all 256 values, for narrow and wide normals, near and outside the edges, also in float32."""
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        for mean in (-1.2, -1.0, 0.0, 0.5013, 1.0):
            for std in (1e-3, 1e-2, 0.5, 10.0):
                x = values.to(dtype)
                log_var = torch.full_like(x, 2 * math.log(std))
                nll = discretised_normal_nll(x, torch.full_like(x, mean), log_var)
                assert nll.isfinite().all() and (nll >= -1e-6).all()
                assert (-nll).exp().sum().item() == pytest.approx(1, abs=tolerance)
