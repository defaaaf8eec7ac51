"""Samplers as tables: x_next = a x + b x0 + c previous_x0 + std noise, one row of coefficients a step.

Row i goes from times[i] to times[i + 1], the last row to the data itself (alpha 1, sigma 0): there a = c =
std = 0 and b = 1, so every sampler ends exactly on the network's x0. Below, t is where a step starts and s
where it ends, l = log(alpha^2 / sigma^2), and q = 1 - exp(l_t - l_s) in (0, 1] is the share of the noise at t
that a step removes. All in float64; the caller rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.diffusion.names import SAMPLERS, SPACINGS, VARIANCES
from dalle2_fast.diffusion.schedules import Schedule


def step_times(schedule: Schedule, steps: int, spacing: str = "time") -> Tensor:
    """The falling times at which a sampler of `steps` steps calls the network: [steps].

    Discrete: int64 from timesteps - 1 to 0, both included, rounded (2102.09672, section 4); a single step is
    at timesteps - 1. Continuous: float64 from 1, as many steps of equal size as end at 0.

    spacing: "time": even in time. "log_snr": even in log-SNR (2206.00927, section 3.4), which suits dpm++ and
    data with fine detail. Discrete times are then the nearest ones that differ from each other.
    """
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    limit = schedule.timesteps
    if steps < 1 or (limit is not None and steps > limit):
        expected = "at least 1" if limit is None else f"1 to {limit} (the timesteps of the schedule)"
        raise ValueError(f"steps: expected {expected}, got {steps}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: expected one of {', '.join(map(repr, SPACINGS))}, got {spacing!r}")
    if limit is None:
        noisiest, cleanest, points = 1.0, 0.0, steps + 1
    elif steps == 1:
        return torch.tensor([limit - 1])
    else:
        noisiest, cleanest, points = limit - 1, 0, steps
    if spacing == "time":
        times = torch.linspace(noisiest, cleanest, points, dtype=torch.float64)[:steps]
        return times if limit is None else times.round().long()
    low, high = schedule.log_snr(torch.tensor([noisiest, cleanest])).tolist()
    times = schedule.time_at(torch.linspace(low, high, points, dtype=torch.float64))[:steps]
    return times if limit is None else _distinct(times.flip(0), limit).flip(0)


def _distinct(rising: Tensor, limit: int) -> Tensor:
    """Moves equal indices in 0 .. limit - 1 apart: up as far as needed, then down from the end."""
    place = torch.arange(len(rising))
    return torch.minimum((rising - place).cummax(0).values + place, limit - len(rising) + place)


def transition(log_snr_t: Tensor, log_snr_s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q(x_s | x_t, x0) = N(a x_t + b x0, variance): a, b, log variance (-inf where x_s is the data), and the
    log of the forward variance, log beta for neighbouring times.

    Ho et al., 2006.11239, equations 6 and 7, written in log-SNR, where nothing cancels; log_snr_s may be inf.
    """
    share = -torch.expm1(log_snr_t - log_snr_s)
    alpha_t, alpha_s = torch.sigmoid(log_snr_t).sqrt(), torch.sigmoid(log_snr_s).sqrt()
    a = alpha_t / alpha_s * torch.sigmoid(-log_snr_s) / torch.sigmoid(-log_snr_t)
    logsigmoid = torch.nn.functional.logsigmoid
    return a, alpha_s * share, share.log() + logsigmoid(-log_snr_s), share.log() + logsigmoid(-log_snr_t)


def sampler_table(
    schedule: Schedule,
    times: Tensor,  # [steps], falling
    sampler: str,
    *,
    variance: str = "fixed_small",
    eta: float = 0.0,
    x0_error: Tensor | None = None,  # [steps]
) -> Tensor:  # float64 [steps, 8]
    """The table of `functional.diffusion_step`: alpha, sigma, a, b, c, std, log_var_min, log_var_max.

    Args:
        times: where the network is called, strictly falling; see `step_times`.
        sampler: "ddpm" (2006.11239; strided as in 2102.09672), "ddim" (2010.02502, equations 12 and 16),
            "dpm++" (DPM-Solver++(2M), 2211.01095, algorithm 2 with r >= 1: second order, deterministic).
        variance: of ddpm's noise: "fixed_small" (that of the posterior), "fixed_large" (beta),
            "learned_range" (std only marks the noisy steps; diffusion_step interpolates between the last two
            columns).
        eta: of ddim, in [0, 1]: 0 is deterministic, 1 has the posterior's variance.
        x0_error: mean squared error of the network's x0 at each time, per element. With it ddpm's variance is
            the optimal one, fixed_small's + b^2 x0_error: what is unknown of x0 is noise, too (Bao et al.,
            2201.06503, theorem 1, "Analytic-DPM").

    Raises:
        TypeError, ValueError: an unknown sampler or variance, eta out of range or not for this sampler.
    """
    check_sampler(sampler, eta)
    if variance not in VARIANCES:
        raise ValueError(f"variance: expected one of {', '.join(map(repr, VARIANCES))}, got {variance!r}")
    log_snr = schedule.log_snr(times.cpu())
    if times.dim() != 1 or len(times) == 0 or (log_snr.diff() <= 0).any():
        raise ValueError(f"times: expected [steps >= 1], strictly falling, got {times.tolist()}")
    after = torch.cat([log_snr[1:], log_snr.new_tensor([torch.inf])])  # the last step ends on the data
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    alpha_after, sigma_after = torch.sigmoid(after).sqrt(), torch.sigmoid(-after).sqrt()

    a, b, log_var_min, log_var_max = transition(log_snr, after)
    # The posterior's variance of the last step is 0; its log is cut to that of the step before.
    log_var_min[-1] = log_var_min[-2] if len(times) > 1 else log_var_max[-1]
    c, std = torch.zeros_like(a), torch.zeros_like(a)
    if sampler == "ddpm":
        std = (0.5 * (log_var_max if variance == "fixed_large" else log_var_min)).exp()
        if x0_error is not None:
            std = (log_var_min.exp() + b**2 * _checked_error(x0_error, times, variance)).sqrt()
    elif sampler == "ddim":
        std = eta * (0.5 * log_var_min).exp()
        std[-1] = 0.0
        a = (sigma_after**2 - std**2).clamp(min=0).sqrt() / sigma
        b = alpha_after - a * alpha
    else:
        step = (after - log_snr) / 2  # h of the paper: its lambda is half the log-SNR
        a = sigma_after / sigma
        both = -alpha_after * torch.expm1(-step)
        # c < 0 extrapolates x0 from the step before. Not on the first step, which has none before it, nor on
        # the last, whose step is infinite. Nor farther than for steps of equal size: evenly spaced times make
        # huge last steps in log-SNR, over which a line overshoots (known Gaussian data, 10 steps, cosine: the
        # deviation came out 29 % too large, and 2 % too small with this bound; the order stays 2).
        reach = (step[1:-1] / step[:-2]).clamp(max=1.0)
        c[1:-1] = -both[1:-1] * reach / 2
        b = both - c
    a[-1], b[-1], c[-1], std[-1] = 0.0, 1.0, 0.0, 0.0
    return torch.stack([alpha, sigma, a, b, c, std, log_var_min, log_var_max], dim=1)


def _checked_error(x0_error: Tensor, times: Tensor, variance: str) -> Tensor:
    x0_error = x0_error.to("cpu", torch.float64)
    if variance != "fixed_small":
        raise ValueError(f"x0_error: expected variance='fixed_small' with it, got {variance!r}")
    if x0_error.shape != times.shape or not (x0_error >= 0).all():
        expected = f"[steps] = ({len(times)},) numbers >= 0"
        raise ValueError(f"x0_error: expected {expected}, got {x0_error.tolist()}")
    return x0_error


def inversion_table(schedule: Schedule, times: Tensor) -> Tensor:
    """DDIM backwards, from the data to noise: float64 [steps - 1, 8] for rising times [steps >= 2].

    Row i takes x at times[i] to times[i + 1] with the network's x0 at times[i]; at times[0] x is alpha x0
    (Song et al., 2010.02502, section 4.3; Ramesh et al., 2204.06125, section 3).
    """
    log_snr = schedule.log_snr(times.cpu())
    if times.dim() != 1 or len(times) < 2 or (log_snr.diff() >= 0).any():
        raise ValueError(f"times: expected [steps >= 2], strictly rising, got {times.tolist()}")
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    a = sigma[1:] / sigma[:-1]
    b = alpha[1:] - a * alpha[:-1]
    nothing = torch.zeros_like(a)
    return torch.stack([alpha[:-1], sigma[:-1], a, b, nothing, nothing, nothing, nothing], dim=1)


def inversion_ends(schedule: Schedule, times: Tensor) -> tuple[Tensor, list[float]]:
    """The same steps from where they end, that from the data to times[0] first: a table float64 [steps, 8]
    and factors [steps].

    x at times[i] = factors[i] x before it + (sigma - factors[i] sigma before it) epsilon, with the network's
    epsilon at times[i]; row i of the table gives the second term. Written with epsilon, because as an
    equation for the end it is a contraction (with x0, as in `inversion_table`, it is none).
    """
    alpha, sigma = schedule.alpha(times.cpu()), schedule.sigma(times.cpu())
    factors = torch.cat([alpha[:1], alpha[1:] / alpha[:-1]])
    gain = 1 - factors * torch.cat([sigma.new_zeros(1), sigma[:-1]]) / sigma
    nothing = torch.zeros_like(gain)
    columns = [alpha, sigma, gain, -gain * alpha, nothing, nothing, nothing, nothing]
    return torch.stack(columns, dim=1), factors.tolist()


def check_sampler(sampler: str, eta: float) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(map(repr, SAMPLERS))}, got {sampler!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number in [0, 1], got {eta}")
    if eta > 0 and sampler != "ddim":
        raise ValueError(f"eta: expected 0 because sampler {sampler!r} has none, got {eta}")
