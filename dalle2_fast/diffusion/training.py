"""Training of a Gaussian diffusion process: the times that are drawn, and the loss at them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion._checks import check_data
from dalle2_fast.diffusion.vlb import vlb_term
from dalle2_fast.diffusion.weighting import loss_weight
from dalle2_fast.ops._broadcast import per_sample
from dalle2_fast.ops._dtypes import compute_dtype

if TYPE_CHECKING:
    from dalle2_fast.diffusion.process import GaussianDiffusion
    from dalle2_fast.diffusion.sampling import Net


def sample_times(
    diffusion: GaussianDiffusion,
    batch: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Training times [batch]: int64 indices, or float64 in [0, 1) for a continuous schedule."""
    # A generator draws on its own device, which need not be the data's.
    drawn_on = generator.device if generator is not None else device
    u = torch.rand(batch, generator=generator, device=drawn_on, dtype=torch.float64)
    u = u.to(device if device is not None else u.device)
    if diffusion.stratified:
        u = (torch.arange(batch, device=u.device) + u) / max(batch, 1)
    schedule = diffusion.schedule
    if diffusion.log_snr_focus is None:
        return schedule.uniform_time(u)
    # One uniform number for both choices (inverse of the mixture's distribution), so that stratifying it
    # stratifies the mixture.
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
    """The loss of each sample, float32 (float64 for such x0).

    Args:
        net: called once, net(x_t, time) with time float32 [B] (0 .. 1000) -> [B, C, *], or [B, 2C, *]
            with a learned range.
        x0: clean data; images in [-1, 1].
        t: times, drawn by `sample_times` when None.
        noise: drawn by `generator` when None.
        pixel_weight: factor on the squared error of each element, before the mean over elements.

    With a learned range the bound is added, in which the mean is detached: it teaches the variance only
    (Nichol and Dhariwal, 2102.09672, equation 16).
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
        noise = torch.randn(x0.shape, generator=generator, device=drawn_on, dtype=x0.dtype).to(x0.device)
    alpha, sigma = diffusion.alpha_sigma(t, x0)
    x_t, noise = functional.add_noise(x0, alpha, sigma, noise)
    output, variance_logit = diffusion.split_output(net(x_t, diffusion.schedule.net_time(t)), x_t)

    dtype = compute_dtype(x0.dtype)
    if diffusion.prediction == "epsilon":
        target = noise.to(dtype)
    elif diffusion.prediction == "sample":
        target = x0.to(dtype)
    else:
        target = per_sample(alpha, x0) * noise - per_sample(sigma, x0) * x0
    squared = (output.to(dtype) - target) ** 2
    if pixel_weight is not None:
        squared = squared * pixel_weight
    weight = loss_weight(
        diffusion.schedule.log_snr(t), diffusion.prediction, diffusion.weighting, diffusion.min_snr_gamma,
        diffusion.max_weight,
    )  # fmt: skip
    loss = weight.to(dtype) * squared.flatten(1).mean(1)
    if variance_logit is not None and diffusion.vlb_weight > 0:
        term = vlb_term(diffusion, x0, x_t, t, output.detach(), variance_logit, clip=None, levels=256)
        loss = loss + diffusion.vlb_weight * diffusion.schedule.timesteps * term
    return loss
