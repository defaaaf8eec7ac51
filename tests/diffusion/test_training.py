"""Training losses, times and the learned variance, against formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from tests.support.gaussian_data import MEAN, data

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_answer_has_no_loss(prediction):
    schedule = make_schedule("cosine")
    process = GaussianDiffusion(schedule, prediction, weighting="uniform")
    x0, noise = data(), data() - MEAN
    t = torch.tensor([0, 10, 300, 700, 990, 999])
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (schedule.alpha(t), schedule.sigma(t)))
    answer = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[prediction]
    seen = {}

    def net(x: Tensor, time: Tensor) -> Tensor:
        seen.update(x=x, time=time)
        return answer

    loss = process.training_loss(net, x0, t=t, noise=noise)
    assert loss.shape == (6,) and loss.abs().max() < 1e-20
    torch.testing.assert_close(seen["x"], alpha * x0 + sigma * noise)
    assert seen["time"].dtype == torch.float32 and seen["time"].tolist() == t.tolist()
    torch.testing.assert_close(process.predict_x0(seen["x"], t, answer), x0, rtol=1e-7, atol=1e-7)
    off = process.training_loss(lambda x, time: answer + 0.1, x0, t=t, noise=noise)
    torch.testing.assert_close(off, torch.full((6,), 0.01, dtype=torch.float64))


@pytest.mark.parametrize("weighting", ["simple", "x0", "v", "min_snr"])
def test_the_weighting_means_the_same_for_every_prediction(weighting):
    """A network that is wrong by the same x0 has the same loss, whichever way it says so."""
    schedule = make_schedule("cosine")
    t = torch.tensor([50, 200, 400, 600, 800, 900])
    snr = schedule.log_snr(t).exp()
    x0, noise, error = data(), data() - MEAN, 0.01 * data()
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (schedule.alpha(t), schedule.sigma(t)))
    x_t = alpha * x0 + sigma * noise
    said_x0 = x0 + error
    said_noise = (x_t - alpha * said_x0) / sigma
    answers = {"sample": said_x0, "epsilon": said_noise, "v_prediction": alpha * said_noise - sigma * said_x0}
    s = sigma / alpha  # EDM's noise level; its state is x_t / alpha
    skip, out = 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25).sqrt()
    answers["edm"] = (said_x0 - skip * x_t / alpha) / out
    weight = {"simple": snr, "x0": torch.ones_like(snr), "v": 1 + snr, "min_snr": snr.clamp(max=5)}[weighting]
    wanted = weight * (error**2).flatten(1).mean(1)
    for prediction, answer in answers.items():
        process = GaussianDiffusion(schedule, prediction, weighting=weighting, max_weight=1e12)
        loss = process.training_loss(lambda x, time, answer=answer: answer, x0, t=t, noise=noise)
        torch.testing.assert_close(loss, wanted, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    "prediction, unit",
    [("sample", lambda snr: 1), ("epsilon", lambda snr: snr), ("v_prediction", lambda snr: snr + 1)],
)
def test_min_snr_weights(prediction, unit):
    """Hang et al., 2303.09556, section 3.4: min(SNR, 5) / {1, SNR, SNR + 1}."""
    schedule = make_schedule("cosine")
    t = torch.arange(0, 1000, 37)
    snr = schedule.log_snr(t).exp()
    process = GaussianDiffusion(schedule, prediction, weighting="min_snr")
    x0 = torch.zeros(len(t), 1, dtype=torch.float64)
    loss = process.training_loss(lambda x, time: torch.ones_like(x), x0, t=t, noise=torch.zeros_like(x0))
    torch.testing.assert_close(loss, snr.clamp(max=5) / unit(snr))


def test_weights_are_bounded():
    """1 + SNR is 24,000 at the first time of the cosine schedule: one such sample would drown a batch."""
    x0 = torch.zeros(2, 1)
    for bound in (100.0, 7.0):
        process = GaussianDiffusion(make_schedule("cosine"), "sample", weighting="v", max_weight=bound)
        loss = process.training_loss(
            lambda x, time: torch.ones_like(x), x0, t=torch.tensor([0, 999]), noise=torch.zeros_like(x0)
        )
        torch.testing.assert_close(loss, torch.tensor([bound, 1.0]))


def test_pixel_weight_scales_the_squared_error():
    process = GaussianDiffusion(make_schedule("cosine"), "sample", weighting="uniform")
    x0 = data()
    weight = torch.zeros(6, 1, 4, 4)
    weight[:, :, 1, 2] = 8.0
    loss = process.training_loss(lambda x, time: x0 + 2.0, x0, pixel_weight=weight)
    torch.testing.assert_close(loss, torch.full_like(loss, 8 * 4 / 16))


def test_the_loss_follows_the_generator_and_is_float32_for_half():
    process = GaussianDiffusion(make_schedule("cosine"), "v_prediction", log_snr_focus=(-4, 1, 0.5))
    x0 = data().float()
    first, second = (process.training_loss(lambda x, time: x, x0, generator=generator()) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float32
    other = process.training_loss(lambda x, time: x, x0, generator=generator(2))
    assert not torch.equal(first, other)
    half = process.training_loss(lambda x, time: x, x0.bfloat16(), generator=generator())
    assert half.dtype == torch.float32 and half.isfinite().all()


# -- times ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("name", ["cosine", "continuous_cosine"])
def test_times_are_uniform(name, stratified):
    process = GaussianDiffusion(make_schedule(name), stratified=stratified)
    t = process.sample_times(20_000, generator())
    scale = 1000 if process.schedule.timesteps else 1
    assert t.dtype == (torch.int64 if process.schedule.timesteps else torch.float64)
    assert t.min() >= 0 and t.max() <= (999 if process.schedule.timesteps else 1)
    counts = torch.histc((t.double() / scale).float(), 10, 0, 1)
    assert (counts - 2000).abs().max() < (3 if stratified else 5 * 2000**0.5)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("name", ["cosine", "continuous_cosine"])
def test_focus_draws_its_fraction_evenly_in_log_snr(name, stratified):
    schedule = make_schedule(name)
    process = GaussianDiffusion(schedule, log_snr_focus=(-4.0, 1.0, 0.6), stratified=stratified)
    log_snr = schedule.log_snr(process.sample_times(20_000, generator()))
    edges = torch.linspace(-4, 1, 6, dtype=torch.float64)
    time = schedule.time_at(edges) / (schedule.timesteps or 1)
    for i in range(5):
        share = ((log_snr >= edges[i]) & (log_snr < edges[i + 1])).double().mean().item()
        wanted = 0.6 / 5 + 0.4 * (time[i] - time[i + 1]).item()
        assert share == pytest.approx(wanted, abs=0.012)
    assert process.sample_times(0).shape == (0,)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_focus_may_be_nothing_or_everything(fraction):
    schedule = make_schedule("continuous_cosine")
    process = GaussianDiffusion(schedule, log_snr_focus=(-4, 1, fraction))
    log_snr = schedule.log_snr(process.sample_times(5000, generator()))
    inside = ((log_snr >= -4 - 1e-6) & (log_snr <= 1 + 1e-6)).double().mean()
    assert inside == 1 if fraction else inside < 0.6


# -- learned variance ----------------------------------------------------------------------------------


def hybrid(prediction: str, x0: Tensor, t: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    """The hybrid loss and its gradients in the two halves of the network's output, for made-up outputs."""
    process = GaussianDiffusion(make_schedule("cosine"), prediction, variance="learned_range", **options)
    output = torch.randn((len(x0), 2 * x0.shape[1], *x0.shape[2:]), generator=generator(3), dtype=x0.dtype)
    output.requires_grad_()
    noise = torch.randn(x0.shape, generator=generator(4), dtype=x0.dtype)
    loss = process.training_loss(lambda x, time: output, x0, t=t, noise=noise)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    return loss.detach(), *gradient.chunk(2, dim=1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_loss_detaches_the_mean(prediction):
    """The bound teaches the variance only: the mean's gradient is that of the simple loss, to the bit."""
    x0, t = data().clamp(-1, 1), torch.tensor([0, 1, 5, 100, 500, 990])
    loss, of_mean, of_variance = hybrid(prediction, x0, t, vlb_weight=0.5)
    simple, of_simple_mean, of_nothing = hybrid(prediction, x0, t, vlb_weight=0.0)
    assert torch.equal(of_mean, of_simple_mean)
    assert (of_nothing == 0).all() and (of_variance.flatten(1).abs().amax(1) > 0).all()
    assert (loss > simple).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_loss_is_the_kl_of_the_two_steps(prediction):
    """DALLE2-pytorch reads x0 and v as noise in its bound; then this fails for two predictions of three."""
    schedule = make_schedule("cosine", 200)
    process = GaussianDiffusion(schedule, prediction, variance="learned_range", vlb_weight=1.0)
    x0, noise, said_x0 = data().clamp(-1, 1), data() - MEAN, (data() + 0.2).clamp(-1, 1)
    position = torch.rand(x0.shape, generator=generator(), dtype=torch.float64) * 2 - 1
    t = torch.tensor([1, 2, 20, 90, 150, 180])
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (schedule.alpha(t), schedule.sigma(t)))
    x_t = alpha * x0 + sigma * noise
    said_noise = (x_t - alpha * said_x0) / sigma
    said_v = alpha * said_noise - sigma * said_x0
    answer = {"epsilon": said_noise, "sample": said_x0, "v_prediction": said_v}[prediction]
    net_output = torch.cat([answer, position], dim=1)
    loss = process.training_loss(lambda x, time: net_output, x0, t=t, noise=noise)
    simple = GaussianDiffusion(schedule, prediction)
    plain = simple.training_loss(lambda x, time: answer, x0, t=t, noise=noise)

    mean, variance, log_small = process.posterior(x0, x_t, t)
    said_mean, _, _ = process.posterior(said_x0, x_t, t)
    log_large = schedule.betas[t].log().reshape(-1, 1, 1, 1)
    log_said = (position + 1) / 2 * log_large + (1 - position) / 2 * log_small
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()),
        torch.distributions.Normal(said_mean, (0.5 * log_said).exp()),
    )
    wanted = 200 * kl.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(loss - plain, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("said", [0.0, 1.0, -1.0, 30.0, -30.0, 1e4, -1e4])
def test_learned_variance_gives_no_nan(said, dtype):
    """Far outside [-1, 1] exp(-log variance) overflows and 0 * inf is NaN (DALLE2-pytorch, issue 135)."""
    t = torch.tensor([0, 0, 1, 2, 500, 999])
    x0 = data().clamp(-1, 1).to(dtype)
    x0[0], x0[1] = 1.0, -1.0
    process = GaussianDiffusion(make_schedule("cosine"), variance="learned_range")
    for perfect in (True, False):
        noise = torch.randn(x0.shape, generator=generator(), dtype=dtype)
        mean = (noise if perfect else 50 * noise).requires_grad_()
        position = torch.full_like(x0, said).requires_grad_()
        loss = process.training_loss(
            lambda x, time, mean=mean, position=position: torch.cat([mean, position], 1), x0, t=t,
            noise=noise.detach(),
        )  # fmt: skip
        gradients = torch.autograd.grad(loss.sum(), (mean, position))
        assert loss.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
