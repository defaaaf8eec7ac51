"""Training with a Gaussian diffusion process: which times are drawn, and the weighted loss at those times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion._checks import check_data
from dalle2_fast.diffusion.preconditioning import precondition
from dalle2_fast.diffusion.vlb import vlb_term
from dalle2_fast.draws import batch_rows, draw
from dalle2_fast.ops._dtypes import compute_dtype, per_sample

if TYPE_CHECKING:
    from dalle2_fast.diffusion.process import GaussianDiffusion
    from dalle2_fast.diffusion.sampling import Net


def sample_times(
    diffusion: GaussianDiffusion,
    batch: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw training times.

    Args:
        diffusion: the process.
        batch: the number of times.
        generator: source of the random numbers; None is torch's default generator.
        device: where the times are wanted; None is the device of the generator.

    Returns:
        [batch]: int64 indices, or float64 in [0, 1) for a continuous schedule.

    Example:
        >>> from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
        >>> sample_times(GaussianDiffusion(make_schedule("cosine")), 4).dtype
        torch.int64
    """
    # A generator can only draw on its device, which need not be the device of the data.
    drawn_on = generator.device if generator is not None else device
    u = draw(torch.rand, (batch,), generator, device=drawn_on, dtype=torch.float64)
    u = u.to(device if device is not None else u.device)
    if diffusion.stratified:
        first, total = batch_rows(batch, generator)
        u = (torch.arange(first, first + batch, device=u.device) + u) / max(total, 1)
    schedule = diffusion.schedule
    if diffusion.log_snr_focus is None:
        return schedule.uniform_time(u)
    # One uniform number makes both choices (the inverse distribution function of the mixture), so that
    # stratifying the number stratifies the mixture.
    low, high, fraction = diffusion.log_snr_focus
    focused = schedule.time_at(low + (high - low) * u / max(fraction, 1e-12))
    uniform = schedule.uniform_time(((u - fraction) / max(1 - fraction, 1e-12)).clamp(0, 1))
    return torch.where(u < fraction, focused, uniform)


def training_loss(
    diffusion: GaussianDiffusion,
    net: Net,
    x0: Tensor,  # [B, C, *]
    *,
    t: Tensor | None = None,  # [B]
    noise: Tensor | None = None,  # [B, C, *]
    generator: torch.Generator | None = None,
    pixel_weight: Tensor | None = None,  # broadcasts to x0
) -> Tensor:  # [B]
    """The training loss of each sample.

    With a learned range the variational bound is added. Its mean is detached, so that the bound trains the
    variance only.

    Args:
        diffusion: the process.
        net: called once as net(x_t, time) with time float32 [B] in 0 .. 1000; returns [B, C, *], or
            [B, 2C, *] with a learned range.
        x0: clean data, floating; images in [-1, 1].
        t: times; None draws them with `sample_times`.
        noise: standard normal noise; None draws it from `generator`.
        generator: source of the random numbers; None is torch's default generator.
        pixel_weight: factor on the squared error of each element, before the mean over elements.

    Returns:
        float32 [B] (float64 for a float64 x0).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape, or the output of net has.

    Source: Ho et al., 2006.11239, section 3.4; Nichol and Dhariwal, 2102.09672, equation 16, for the hybrid
    loss.

    Example:
        >>> from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine"), prediction="sample", weighting="uniform")
        >>> training_loss(diffusion, lambda x, time: torch.zeros_like(x), torch.full((2, 3), 0.5))
        tensor([0.2500, 0.2500])
    """
    check_data(x0)
    batch = x0.shape[0]
    if t is None:
        t = diffusion.sample_times(batch, generator, x0.device)
    elif tuple(t.shape) != (batch,):
        raise ValueError(f"t: expected [B] = ({batch},), got {tuple(t.shape)}")
    else:
        t = t.to(x0.device)
    if noise is None:
        drawn_on = generator.device if generator is not None else x0.device
        noise = draw(torch.randn, x0.shape, generator, device=drawn_on, dtype=x0.dtype).to(x0.device)
    alpha, sigma = diffusion.alpha_sigma(t, x0)
    x_t, noise = functional.add_noise(x0, alpha, sigma, noise)
    output = net(diffusion.network_input(x_t, t), diffusion.schedule.net_time(t))
    output, variance_logit = diffusion.split_output(output, x_t)

    dtype = compute_dtype(x0.dtype)
    if diffusion.prediction == "epsilon":
        target = noise.to(dtype)
    elif diffusion.prediction == "sample":
        target = x0.to(dtype)
    elif diffusion.prediction == "edm":
        target = diffusion.preconditioned_target(x0.to(dtype), noise.to(dtype), t)
    else:
        target = per_sample(alpha, x0) * noise - per_sample(sigma, x0) * x0
    squared = (output.to(dtype) - target) ** 2
    if pixel_weight is not None:
        squared = squared * pixel_weight
    weight = loss_weight(
        diffusion.schedule.log_snr(t), diffusion.prediction, diffusion.weighting, diffusion.min_snr_gamma,
        diffusion.max_weight, diffusion.sigma_data,
    )  # fmt: skip
    loss = weight.to(dtype) * squared.flatten(1).mean(1)
    if variance_logit is not None and diffusion.vlb_weight > 0:
        term = vlb_term(diffusion, x0, x_t, t, output.detach(), variance_logit, clip=None, levels=256)
        loss = loss + diffusion.vlb_weight * diffusion.schedule.timesteps * term
    return loss


def loss_weight(
    log_snr: Tensor,  # [B]
    prediction: str,
    weighting: str,
    min_snr_gamma: float,
    max_weight: float,
    sigma_data: float = 0.5,
) -> Tensor:  # float64 [B]
    """The weight on the network's squared error that makes the loss that of `weighting`.

    An error of x0 equals sigma / alpha times an error of epsilon, sigma times an error of v, and with "edm"
    gain times the network's error. If w is the weight on the error of x0, the weight is therefore w for a
    network that predicts x0, w / SNR for epsilon, w / (1 + SNR) for v and w gain^2 for "edm". The weightings
    are

        x0: w = 1    simple (epsilon): w = SNR    v: w = 1 + SNR    min_snr: w = min(SNR, gamma)

    and "uniform" is weight 1 on the error of what the network predicts.

    Args:
        log_snr: log(alpha^2 / sigma^2) at the times of the batch.
        prediction: one of `names.PREDICTIONS`.
        weighting: one of `names.WEIGHTINGS`.
        min_snr_gamma: gamma of "min_snr", > 0.
        max_weight: upper bound on the returned weights, > 0.
        sigma_data: of the prediction "edm", see `precondition`.

    Returns:
        The weights, float64 [B].

    Source: Hang et al., 2303.09556, for min_snr.

    Example:
        >>> loss_weight(torch.zeros(2), "epsilon", "min_snr", min_snr_gamma=5.0, max_weight=100.0)
        tensor([1., 1.], dtype=torch.float64)
    """
    log_snr = log_snr.to(torch.float64)
    if weighting == "uniform":
        return torch.ones_like(log_snr)
    # Ratios in closed form: SNR itself can overflow or vanish, these ratios cannot.
    noise_share = torch.sigmoid(-log_snr)  # sigma^2 = 1 / (1 + SNR)
    log_cap = torch.full_like(log_snr, min_snr_gamma).log()
    log_weight = {
        "x0": torch.zeros_like(log_snr),
        "simple": log_snr,
        "v": -noise_share.log(),
        "min_snr": torch.minimum(log_snr, log_cap),
    }[weighting]
    log_unit = {
        "sample": torch.zeros_like(log_snr),
        "epsilon": log_snr,
        "v_prediction": -noise_share.log(),
        "edm": -2 * precondition(log_snr, sigma_data).gain.log(),
    }[prediction]
    return (log_weight - log_unit).exp().clamp(max=max_weight)
