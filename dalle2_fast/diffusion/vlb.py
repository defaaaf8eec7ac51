"""The variational bound (VLB) on -log p(x0): its terms in bits per dimension, for any prediction.

    L_T = KL(q(x_T | x0) || N(0, I))                       the prior term
    L_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))     the term of a step
    L_0 = -log p(x0 | x_0)                                 the term of the last step

Every term follows from the predicted x0, so the bound does not depend on what the network predicts.

Source: Ho et al., 2006.11239, equation 5.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion._checks import check_data
from dalle2_fast.diffusion.sampler_tables import transition
from dalle2_fast.diffusion.schedules import Schedule
from dalle2_fast.ops._dtypes import compute_dtype, per_sample

if TYPE_CHECKING:
    from dalle2_fast.diffusion.process import GaussianDiffusion
    from dalle2_fast.diffusion.sampling import Net

# The variance logit of a network is meant to be in [-1, 1]. Far outside, exp(-log_var) overflows and 0 * inf
# is NaN. Up to this bound nothing is clamped, and log_var stays within 10 ranges of [log_var_min,
# log_var_max]. A range is below 0.8 with 1000 timesteps and below 4 with any number of them, so that the
# exponent is below 42, and float32 overflows at 88.
_LARGEST_VARIANCE_LOGIT = 20.0


@torch.no_grad()
def vlb_bits_per_dim(
    diffusion: GaussianDiffusion,
    net: Net,
    x0: Tensor,  # [B, C, *]
    *,
    seeds: Tensor,  # int64 [B]
    clip: float | None = 1.0,
    levels: int | None = 256,
) -> dict[str, Tensor]:
    """The variational bound on -log2 p(x0) per dimension. It calls net once per timestep.

    Args:
        diffusion: a process with discrete times.
        net: as in `training_loss`.
        x0: data in [-1, 1], floating.
        seeds: seeds of the noise.
        clip: bound on the predicted x0; None for no bound.
        levels: the number of values in [-1, 1] that the data can have (256 for 8-bit images), or None for
            continuous data, of which the bound is a density.

    Returns:
        "total" [B] = "prior" [B] + the sum of "terms" [B, timesteps], whose column t is L_t.

    Raises:
        TypeError, ValueError: x0 has the wrong dtype or shape, or the times are continuous.

    Source: Ho et al., 2006.11239, equation 5.

    Example:
        >>> from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine", 5), prediction="sample")
        >>> net = lambda x, time: torch.zeros_like(x)
        >>> bound = vlb_bits_per_dim(diffusion, net, torch.zeros(2, 3, 4, 4), seeds=torch.tensor([0, 1]))
        >>> bound["terms"].shape
        torch.Size([2, 5])
    """
    check_data(x0)
    schedule = diffusion.schedule
    if schedule.timesteps is None:
        raise ValueError(f"schedule: expected one with discrete times for the bound, got {schedule}")
    terms = []
    for step in range(schedule.timesteps):
        t = torch.full((x0.shape[0],), step, device=x0.device)
        alpha, sigma = diffusion.alpha_sigma(t, x0)
        x_t, _ = functional.add_noise(x0, alpha, sigma, seeds=seeds, step=step)
        output, variance_logit = diffusion.split_output(
            net(diffusion.network_input(x_t, t), schedule.net_time(t)), x_t
        )
        terms.append(vlb_term(diffusion, x0, x_t, t, output, variance_logit, clip, levels))
    prior = prior_term(schedule, x0.to(compute_dtype(x0.dtype)))
    terms = torch.stack(terms, dim=1)
    return {"total": prior + terms.sum(1), "prior": prior, "terms": terms}


def vlb_term(
    diffusion: GaussianDiffusion,
    x0: Tensor,  # [B, C, *]
    x_t: Tensor,
    t: Tensor,  # int64 [B]
    output: Tensor,  # the network's prediction at x_t
    variance_logit: Tensor | None,  # the network's second half with a learned range
    clip: float | None,
    levels: int | None,
) -> Tensor:  # [B]
    """L_t in bits per dimension, from the output at x_t; clip and levels as in `vlb_bits_per_dim`."""
    dtype = compute_dtype(x0.dtype)
    x0, x_t, output = x0.to(dtype), x_t.to(dtype), output.to(dtype)
    predicted_x0 = diffusion.predict_x0(x_t, t, output)
    if clip is not None:
        predicted_x0 = predicted_x0.clamp(-clip, clip)
    a, b, log_var_min, log_var_max = single_step(diffusion.schedule, t, x0)
    last = (t.to(x0.device) == 0).reshape(a.shape)
    mean, true_mean = a * x_t + b * predicted_x0, a * x_t + b * x0
    if variance_logit is not None:
        logit = variance_logit.to(x0.dtype).clamp(-_LARGEST_VARIANCE_LOGIT, _LARGEST_VARIANCE_LOGIT)
        log_var = torch.lerp(log_var_min, log_var_max, (logit + 1) / 2)
    elif diffusion.variance == "fixed_large":
        # For the likelihood of the data the beta of the last step is needlessly large; improved DDPM's code
        # makes the same exception.
        log_var = torch.where(last, log_var_min, log_var_max)
    else:
        log_var = log_var_min
    kl = normal_kl(true_mean, log_var_min, mean, log_var)
    if levels is None:
        nll = normal_nll(x0, mean, log_var)
    else:
        nll = discretised_normal_nll(x0, mean, log_var, levels)
    return torch.where(last, nll, kl).flatten(1).mean(1) / math.log(2)


def single_step(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, log_var_min and log_var_max of the step from t [B] to t - 1, [B, 1, ...] for `like` [B, ...].

    q(x_{t-1} | x_t, x0) = N(a x_t + b x0, exp(log_var_min)), and log_var_max = log beta. At t = 0 the
    variance of the posterior is 0, and log_var_min is that of t = 1.
    """
    if schedule.timesteps is None:
        raise ValueError(f"schedule: expected one with discrete times, got {schedule}")
    t = t.to(like.device)

    def coefficients(t: Tensor) -> tuple[Tensor, ...]:
        before = schedule.log_snr((t - 1).clamp(min=0)).masked_fill(t == 0, torch.inf)
        return transition(schedule.log_snr(t), before)

    a, b, log_var_min, log_var_max = coefficients(t)
    log_var_min = coefficients(t.clamp(min=1))[2] if schedule.timesteps > 1 else log_var_max
    dtype = compute_dtype(like.dtype)
    return tuple(per_sample(value.to(dtype), like) for value in (a, b, log_var_min, log_var_max))


def prior_term(schedule: Schedule, x0: Tensor) -> Tensor:  # [B, C, *] -> [B]
    """Prior term of the VLB, KL(q(x_T | x0) || N(0, I)), in bits per dimension."""
    log_snr = schedule.log_snr(torch.tensor(schedule.timesteps - 1, device=x0.device))
    log_var = torch.nn.functional.logsigmoid(-log_snr)
    zero = torch.zeros_like(log_var)
    kl = normal_kl(torch.sigmoid(log_snr).sqrt() * x0, log_var, zero, zero)
    return kl.flatten(1).mean(1) / math.log(2)


def normal_kl(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor) -> Tensor:
    """KL(N(mean_1, exp(log_var_1)) || N(mean_2, exp(log_var_2))) in nats, per element."""
    difference = log_var_1 - log_var_2
    return 0.5 * (torch.expm1(difference) - difference + (mean_1 - mean_2) ** 2 * torch.exp(-log_var_2))


def normal_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log N(x; mean, exp(log_var)) in nats, per element."""
    return 0.5 * (1.8378770664093453 + log_var + (x - mean) ** 2 * torch.exp(-log_var))  # log(2 pi)


def discretised_normal_nll(x: Tensor, mean: Tensor, log_var: Tensor, levels: int = 256) -> Tensor:
    """-log of the probability of the bin of x under N(mean, exp(log_var)), in nats per element.

    The bins are 2 / (levels - 1) wide; the two outer bins extend to infinity. The probability is computed
    from log cumulative distributions, because a difference of cumulative distributions is 0 in the tails.

    Args:
        x: data, one of `levels` evenly spaced values in [-1, 1].
        mean: the mean, same shape.
        log_var: the log variance, same shape or broadcastable.
        levels: the number of values.

    Source: Ho et al., 2006.11239, equation 13.

    Example:
        >>> values = torch.linspace(-1, 1, 5)
        >>> nll = discretised_normal_nll(values, torch.zeros(5), torch.zeros(5), levels=5)
        >>> round((-nll).exp().sum().item(), 4)
        1.0
    """
    half, inverse_std = 1 / (levels - 1), torch.exp(-0.5 * log_var)
    distance = (x - mean).abs()
    upper = torch.special.log_ndtr((half - distance) * inverse_std)
    lower = torch.special.log_ndtr((-half - distance) * inverse_std)
    # Where the bin is too narrow for the precision, the difference of the logs is clamped just below 0.
    inner = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-torch.finfo(x.dtype).eps)))
    lowest = torch.special.log_ndtr((x - mean + half) * inverse_std)
    highest = torch.special.log_ndtr((mean - x + half) * inverse_std)
    edge = 1 - half
    return -torch.where(x < -edge, lowest, torch.where(x > edge, highest, inner))
