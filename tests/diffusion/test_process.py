"""The process itself: its posterior against Bayes' rule, its configuration, what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from tests.support.gaussian_data import data

# -- the posterior -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_posterior_is_its_closed_formula(name):
    schedule = make_schedule(name)
    process = GaussianDiffusion(schedule)
    t = torch.tensor([0, 1, 2, 500, 998, 999])
    kept = (1 - schedule.betas).cumprod(0)
    before = torch.cat([kept.new_ones(1), kept])[t].reshape(-1, 1, 1, 1)
    beta, kept = schedule.betas[t].reshape(-1, 1, 1, 1), kept[t].reshape(-1, 1, 1, 1)
    x0, x_t = data(), data() + 1
    mean, variance, log_variance = process.posterior(x0, x_t, t)
    wanted = before.sqrt() * beta / (1 - kept) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - kept) * x_t
    torch.testing.assert_close(mean, wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(variance, beta * (1 - before) / (1 - kept), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(log_variance[1:], variance[1:].log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_variance[0], log_variance[1])
    assert torch.equal(mean[0], x0[0])


def test_posterior_is_bayes_rule():
    """q(x_s | x_t, x0) is proportional to q(x_t | x_s) q(x_s | x0): its mode and curvature, numerically."""
    schedule = make_schedule("linear", 50)
    process = GaussianDiffusion(schedule)
    t = torch.tensor([30])
    alpha, sigma = schedule.alpha(t - 1), schedule.sigma(t - 1)
    beta = schedule.betas[t]
    x0, x_t = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[-0.2]], dtype=torch.float64)

    def log_density(x: Tensor) -> Tensor:
        return -((x_t - (1 - beta).sqrt() * x) ** 2) / (2 * beta) - (x - alpha * x0) ** 2 / (2 * sigma**2)

    mean, variance, _ = process.posterior(x0, x_t, t)
    x = mean.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_density(x), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, x)
    assert slope.abs().item() < 1e-10
    torch.testing.assert_close(-1 / curvature, variance)


# -- configuration and errors --------------------------------------------------------------------------


def test_config_survives_json():
    process = GaussianDiffusion(
        make_schedule("linear", 30), "v_prediction", "learned_range", "min_snr", 3.0, (-4, 1, 0.5), 0.01,
        max_weight=9.0, stratified=True,
    )  # fmt: skip
    again = GaussianDiffusion.from_config(json.loads(json.dumps(process.to_config())))
    assert again.to_config() == process.to_config()
    assert again.log_snr_focus == (-4.0, 1.0, 0.5)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(schedule="cosine"), TypeError, "schedule: expected a Schedule"),
        (dict(prediction="eps"), ValueError, "prediction: expected one of .*'epsilon'.*got 'eps'"),
        (dict(variance="learned"), ValueError, "variance: expected one of .*got 'learned'"),
        (dict(weighting="snr"), ValueError, "weighting: expected one of .*got 'snr'"),
        (dict(min_snr_gamma=0.0), ValueError, "min_snr_gamma: expected a number > 0, got 0.0"),
        (dict(max_weight=math.nan), ValueError, "max_weight: expected a number > 0, got nan"),
        (dict(vlb_weight=-1.0), ValueError, "vlb_weight: expected a finite number >= 0, got -1.0"),
        (dict(log_snr_focus=(1, -4, 0.5)), ValueError, "log_snr_focus: expected .*low < high"),
        (dict(log_snr_focus=(1, 4)), ValueError, "log_snr_focus: expected"),
        (
            dict(schedule=make_schedule("continuous_cosine"), variance="learned_range"),
            ValueError,
            "variance: 'learned_range' needs a discrete schedule",
        ),
    ],
)
def test_bad_settings_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        GaussianDiffusion(**(dict(schedule=make_schedule("cosine")) | arguments))


def test_bad_data_are_named():
    process = GaussianDiffusion(make_schedule("cosine"))
    x0 = data()
    with pytest.raises(TypeError, match="x0: expected a floating-point tensor"):
        process.training_loss(lambda x, time: x, x0.long())
    with pytest.raises(ValueError, match="x0: expected .* got [(]6,[)]"):
        process.training_loss(lambda x, time: x, x0[:, 0, 0, 0])
    with pytest.raises(ValueError, match="t: expected .B. = [(]6,[)], got [(]3,[)]"):
        process.training_loss(lambda x, time: x, x0, t=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"net: expected an output \[B, C, ...\] = .6, 3, 4, 4., got .6, 6,"):
        process.training_loss(lambda x, time: torch.cat([x, x], 1), x0)
    with pytest.raises(ValueError, match="discrete times"):
        continuous = GaussianDiffusion(make_schedule("continuous_cosine"))
        continuous.vlb_bits_per_dim(lambda x, time: x, x0, seeds=torch.arange(6))


def test_float64_tables_are_not_read_on_an_apple_gpu(monkeypatch):
    """Metal has no float64: `--device mps --init-image` failed in the table of the schedule."""

    class OnMps:  # this machine has no such GPU
        device, dtype = torch.device("mps"), torch.float32

    class Value:
        def __init__(self, t):
            assert t.device.type == "cpu"
            self.moves = []

        def to(self, where):
            self.moves.append(where)
            return self

    process = GaussianDiffusion(make_schedule("cosine"))
    monkeypatch.setattr(process.schedule, "alpha", Value)
    monkeypatch.setattr(process.schedule, "sigma", Value)
    for value in process.alpha_sigma(torch.tensor([3]), OnMps()):
        assert value.moves == [torch.float32, torch.device("mps")]
