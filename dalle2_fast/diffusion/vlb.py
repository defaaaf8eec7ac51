"""The variational bound on -log p(x0): its terms in bits per dimension, for networks of any parametrisation.

Ho et al., 2006.11239, equation 5: L_T = KL(q(x_T | x0) || N(0, 1)), L_t = KL(q(x_{t-1} | x_t, x0) ||
p(x_{t-1} | x_t)), L_0 = -log p(x0 | x_0). Everything follows from the predicted x0, so it does not matter
what the network predicts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle2_fast.diffusion import sampler_tables
from dalle2_fast.diffusion.schedules import Schedule

# Learned variance: v is meant in [-1, 1]. Far outside, exp(-log_var) overflows and 0 * inf is NaN. Up to here
# nothing is changed, and log_var stays within 10 ranges of them: log_var_max - log_var_min is below 0.8
# with 1000 timesteps and 4 with any number, so that the exponent is below 42, and float32 ends at 88.
_LARGEST_RANGE_POSITION = 20.0


def single_step(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, log_var_min, log_var_max of the step from t [B] to t - 1, each [B, 1, ...] as `like` [B, ...].

    q(x_{t-1} | x_t, x0) = N(a x_t + b x0, exp(log_var_min)), log_var_max = log beta. At t = 0, where the
    posterior's variance is 0, log_var_min is that of t = 1.
    """
    if schedule.timesteps is None:
        raise ValueError(f"schedule: expected one with discrete times, got {schedule}")
    t = t.to(like.device)

    def coefficients(t: Tensor) -> tuple[Tensor, ...]:
        before = schedule.log_snr((t - 1).clamp(min=0)).masked_fill(t == 0, torch.inf)
        return sampler_tables.transition(schedule.log_snr(t), before)

    a, b, log_var_min, log_var_max = coefficients(t)
    log_var_min = coefficients(t.clamp(min=1))[2] if schedule.timesteps > 1 else log_var_max
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    shape = (-1, *([1] * (like.dim() - 1)))
    return tuple(value.to(wide).reshape(shape) for value in (a, b, log_var_min, log_var_max))


def step_term(
    schedule: Schedule,
    variance: str,
    x0: Tensor,  # [B, C, *] float32 or float64, as the next three
    x_t: Tensor,
    t: Tensor,  # int64 [B]
    predicted_x0: Tensor,
    range_position: Tensor | None,  # the network's second half with a learned range
    levels: int | None,
) -> Tensor:  # [B]
    """L_t in bits per dimension. levels: x0 is one of so many values in [-1, 1]; None: x0 has a density."""
    a, b, log_var_min, log_var_max = single_step(schedule, t, x0)
    last = (t.to(x0.device) == 0).reshape(a.shape)
    mean, true_mean = a * x_t + b * predicted_x0, a * x_t + b * x0
    if range_position is not None:
        position = range_position.to(x0.dtype).clamp(-_LARGEST_RANGE_POSITION, _LARGEST_RANGE_POSITION)
        log_var = torch.lerp(log_var_min, log_var_max, (position + 1) / 2)
    elif variance == "fixed_large":
        # The last step's beta is needlessly large for the likelihood of the data (as in improved DDPM's
        # code).
        log_var = torch.where(last, log_var_min, log_var_max)
    else:
        log_var = log_var_min
    kl = normal_kl(true_mean, log_var_min, mean, log_var)
    if levels is None:
        nll = normal_nll(x0, mean, log_var)
    else:
        nll = discretised_normal_nll(x0, mean, log_var, levels)
    return torch.where(last, nll, kl).flatten(1).mean(1) / math.log(2)


def prior_term(schedule: Schedule, x0: Tensor) -> Tensor:  # [B, C, *] -> [B]
    """L_T in bits per dimension: what of x0 is left in x_T."""
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
    """-log of the normal's mass in x's bin, in nats per element; x in [-1, 1] is one of `levels` values.

    Bins are 2 / (levels - 1) wide, the outer two reach to infinity (Ho et al., 2006.11239, equation 13).
    Through log cumulative distributions: differences of plain ones are 0 in the tails, and so lost.
    """
    half, inverse_std = 1 / (levels - 1), torch.exp(-0.5 * log_var)
    distance = (x - mean).abs()
    upper = torch.special.log_ndtr((half - distance) * inverse_std)
    lower = torch.special.log_ndtr((-half - distance) * inverse_std)
    # The difference of the logs is cut just below 0, where the bin is too narrow for the precision.
    inner = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-torch.finfo(x.dtype).eps)))
    lowest = torch.special.log_ndtr((x - mean + half) * inverse_std)
    highest = torch.special.log_ndtr((mean - x + half) * inverse_std)
    edge = 1 - half
    return -torch.where(x < -edge, lowest, torch.where(x > edge, highest, inner))
