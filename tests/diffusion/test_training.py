"""Training losses and the variational bound, against formulas in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.diffusion.vlb import discretised_normal_nll
from tests.support.gaussian_data import DEVIATION, MEAN, exact_net

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def data(batch: int = 6, channels: int = 3, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, size, size)
    return MEAN + DEVIATION * torch.randn(shape, generator=generator, dtype=torch.float64)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


# -- the bound -----------------------------------------------------------------------------------------


def bound(prediction: str, timesteps: int, x0: Tensor, **options) -> dict[str, Tensor]:
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
    got = bound("v_prediction", timesteps, data(2, 4, 64))
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
    totals = [bound(prediction, 30, x0)["total"] for prediction in PREDICTIONS]
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(totals[2], totals[0], rtol=1e-6, atol=1e-6)


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
