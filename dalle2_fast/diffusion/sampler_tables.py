"""Samplers as tables: x_next = a x + b x0 + c previous_x0 + std noise, one row of coefficients per step.

Row i goes from times[i] to times[i + 1]; the last row goes to the data itself (alpha 1, sigma 0), with
a = c = std = 0 and b = 1, so that every sampler ends exactly at the network's x0.

In the formulas below a step starts at t and ends at s, l = log(alpha^2 / sigma^2), and
q = 1 - exp(l_t - l_s) in (0, 1] is the fraction of the noise at t that the step removes. All tables are
float64; the caller rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle2_fast.diffusion.names import SAMPLERS, SPACINGS, VARIANCES, check_guidance_interval
from dalle2_fast.diffusion.schedules import Schedule


def step_times(schedule: Schedule, steps: int, spacing: str = "time") -> Tensor:
    """The falling times at which a sampler of `steps` steps calls the network.

    Args:
        schedule: the noise schedule of the process.
        steps: the number of steps, >= 1; at most the timesteps of a discrete schedule.
        spacing: "time" spaces the steps evenly in time. "log_snr" spaces them evenly in log-SNR (2206.00927,
            section 3.4), which suits dpm++ and data with fine detail; discrete times are then the nearest
            ones that differ from each other. "trailing" spaces them evenly from the noisiest time, so that
            the last step is as long as the others (2305.08891, section 3.3). The times of N steps are then
            among those of 2 N steps.

    Returns:
        [steps]. Discrete: int64 from timesteps - 1 to 0, both included, rounded (2102.09672, section 4); a
        single step is at timesteps - 1; with "trailing", timesteps - 1 and the last ones before equal
        fractions of the timesteps. Continuous: float64 from 1, in equal steps of which the last one ends
        at 0.

    Raises:
        TypeError, ValueError: steps or spacing has the wrong type or value.

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> step_times(make_schedule("cosine", 1000), 4)
        tensor([999, 666, 333,   0])
    """
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    limit = schedule.timesteps
    if steps < 1 or (limit is not None and steps > limit):
        expected = "at least 1" if limit is None else f"1 to {limit} (the timesteps of the schedule)"
        raise ValueError(f"steps: expected {expected}, got {steps}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: expected one of {', '.join(map(repr, SPACINGS))}, got {spacing!r}")
    if spacing == "trailing" and limit is not None:
        left = torch.arange(steps, 0, -1)  # steps from each time to the data
        return (left * limit + steps - 1) // steps - 1
    if limit is None:
        noisiest, cleanest, points = 1.0, 0.0, steps + 1
    elif steps == 1:
        return torch.tensor([limit - 1])
    else:
        noisiest, cleanest, points = limit - 1, 0, steps
    if spacing != "log_snr":
        times = torch.linspace(noisiest, cleanest, points, dtype=torch.float64)[:steps]
        return times if limit is None else times.round().long()
    low, high = schedule.log_snr(torch.tensor([noisiest, cleanest])).tolist()
    times = schedule.time_at(torch.linspace(low, high, points, dtype=torch.float64))[:steps]
    return times if limit is None else _distinct(times.flip(0), limit).flip(0)


def _distinct(rising: Tensor, limit: int) -> Tensor:
    """Separate equal indices in 0 .. limit - 1: move them up as far as needed, then down from the end."""
    place = torch.arange(len(rising))
    return torch.minimum((rising - place).cummax(0).values + place, limit - len(rising) + place)


def spacing_of(sampler: str) -> str:
    """The spacing with which a sampler is meant: "trailing" for "consistency", whose last step is long.

    Example:
        >>> spacing_of("ddim"), spacing_of("consistency")
        ('time', 'trailing')
    """
    return "trailing" if sampler == "consistency" else "time"


def guided_steps(
    schedule: Schedule, times: Tensor, interval: Sequence[float] | None
) -> list[bool]:
    """Decide on the host, before sampling begins, which steps have guidance.

    Args:
        schedule: the noise schedule of the process.
        times: where the network is called, [steps].
        interval: (low, high) in log-SNR: a step has guidance if low <= log_snr(time) < high. None is every
            step.

    Returns:
        One bool per step.

    Raises:
        TypeError, ValueError: the interval is no pair of finite numbers with low <= high.

    Source: Kynkäänniemi et al., 2404.07724, section 3; its sigma is exp(-log_snr / 2) here.

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> schedule = make_schedule("continuous_log_linear", log_snr_min=-9.0, log_snr_max=9.0)
        >>> guided_steps(schedule, step_times(schedule, 3), (-9, 3))  # log-SNR -9, -3 and 3
        [True, True, False]
    """
    interval = check_guidance_interval(interval, "guidance_interval")
    if interval is None:
        return [True] * len(times)
    low, high = interval
    return [low <= log_snr < high for log_snr in schedule.log_snr(times.cpu()).tolist()]


def transition(log_snr_t: Tensor, log_snr_s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The posterior of a step, q(x_s | x_t, x0) = N(a x_t + b x0, variance), written in log-SNR.

    In log-SNR nothing cancels, also where log_snr_s is infinite.

    Args:
        log_snr_t: log-SNR where the steps start, float64.
        log_snr_s: log-SNR where they end, larger; infinite where x_s is the data.

    Returns:
        a, b, the log variance (minus infinity where x_s is the data), and the log of the forward variance
        (log beta for neighbouring times).

    Source: Ho et al., 2006.11239, equations 6 and 7.

    Example:
        >>> a, b, log_variance, log_beta = transition(torch.tensor(-1.0), torch.tensor(float("inf")))
        >>> a.item(), b.item(), log_variance.item()
        (0.0, 1.0, -inf)
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
    """The table of `functional.diffusion_step` for a sampler.

    Args:
        schedule: the noise schedule of the process.
        times: where the network is called, strictly falling; see `step_times`.
        sampler: "ddpm" (2006.11239; strided as in 2102.09672), "ddim" (2010.02502, equations 12 and 16),
            "dpm++" (DPM-Solver++(2M), 2211.01095, algorithm 2 with r >= 1: second order, deterministic), or
            "consistency" (2303.01469, algorithm 1: x_next = alpha_next x0 + sigma_next noise), for a network
            that was trained to answer with the end of the deterministic flow.
        variance: variance of the noise of ddpm: "fixed_small" (that of the posterior), "fixed_large" (beta)
            or "learned_range" (std only marks the noisy steps; diffusion_step interpolates between the last
            two columns).
        eta: of ddim, in [0, 1]: 0 is deterministic, 1 has the variance of the posterior.
        x0_error: mean squared error of the network's x0 at each time, per element. With it ddpm uses the
            optimal variance, that of fixed_small plus b^2 x0_error: what the network does not know of x0 is
            noise as well (Bao et al., 2201.06503, theorem 1, "Analytic-DPM").

    Returns:
        float64 [steps, 8] on the CPU, with the columns alpha, sigma, a, b, c, std, log_var_min, log_var_max.

    Raises:
        ValueError: an unknown sampler or variance, eta out of range or not an option of this sampler, times
            that do not fall, or an x0_error that does not fit.

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> schedule = make_schedule("cosine")
        >>> sampler_table(schedule, step_times(schedule, 4), "ddim").shape
        torch.Size([4, 8])
    """
    check_sampler(sampler, eta)
    if variance not in VARIANCES:
        raise ValueError(f"variance: expected one of {', '.join(map(repr, VARIANCES))}, got {variance!r}")
    log_snr = schedule.log_snr(times.cpu())
    if times.dim() != 1 or len(times) == 0 or (log_snr.diff() <= 0).any():
        raise ValueError(f"times: expected [steps >= 1], strictly falling, got {times.tolist()}")
    after = torch.cat([log_snr[1:], log_snr.new_tensor([torch.inf])])  # the last step ends at the data
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    alpha_after, sigma_after = torch.sigmoid(after).sqrt(), torch.sigmoid(-after).sqrt()

    a, b, log_var_min, log_var_max = transition(log_snr, after)
    # The posterior variance of the last step is 0; its log is clipped to that of the step before.
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
    elif sampler == "consistency":
        a, b, std = torch.zeros_like(a), alpha_after, sigma_after
    else:
        step = (after - log_snr) / 2  # h of the paper, whose lambda is half the log-SNR
        a = sigma_after / sigma
        both = -alpha_after * torch.expm1(-step)
        # c < 0 extrapolates x0 from the step before. The first step has no step before it, and the last step
        # is infinite, so both have c = 0. The extrapolation is bounded to that of steps of equal size,
        # because times that are even in t make huge last steps in log-SNR, over which a line overshoots
        # (known Gaussian data, 10 steps, cosine: without the bound the deviation was 29 % too large, with it
        # 2 % too small; the order stays 2).
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
    """The table of DDIM backwards, from the data to noise.

    Args:
        schedule: the noise schedule of the process.
        times: rising, [steps >= 2]. At times[0] x is alpha x0.

    Returns:
        float64 [steps - 1, 8], columns as in `sampler_table`. Row i takes x at times[i] to times[i + 1] with
        the network's x0 at times[i].

    Raises:
        ValueError: times do not rise, or there are fewer than 2.

    Source: Song et al., 2010.02502, section 4.3; Ramesh et al., 2204.06125, section 3.

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> inversion_table(make_schedule("cosine"), torch.tensor([0, 400, 999])).shape
        torch.Size([2, 8])
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
    """The steps of `inversion_table`, written as equations for the state where each step ends.

    With the network's epsilon at times[i],

        x at times[i] = factors[i] x before the step + (sigma - factors[i] sigma before it) epsilon.

    The equation is written with epsilon because it is then a contraction in x at times[i], which a fixed
    point iteration can solve. Written with x0, as in `inversion_table`, it is no contraction.

    Args:
        schedule: the noise schedule of the process.
        times: rising, [steps]. Here the step from the data to times[0] is the first one.

    Returns:
        A table float64 [steps, 8] whose row i gives the second term, and the factors [steps].

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> table, factors = inversion_ends(make_schedule("cosine"), torch.tensor([0, 400, 999]))
        >>> table.shape, len(factors)
        (torch.Size([3, 8]), 3)
    """
    alpha, sigma = schedule.alpha(times.cpu()), schedule.sigma(times.cpu())
    factors = torch.cat([alpha[:1], alpha[1:] / alpha[:-1]])
    gain = 1 - factors * torch.cat([sigma.new_zeros(1), sigma[:-1]]) / sigma
    nothing = torch.zeros_like(gain)
    columns = [alpha, sigma, gain, -gain * alpha, nothing, nothing, nothing, nothing]
    return torch.stack(columns, dim=1), factors.tolist()


def check_sampler(sampler: str, eta: float) -> None:
    """Raise ValueError unless this sampler exists and has this eta.

    Example:
        >>> check_sampler("ddim", 0.5)
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(map(repr, SAMPLERS))}, got {sampler!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number in [0, 1], got {eta}")
    if eta > 0 and sampler != "ddim":
        raise ValueError(f"eta: expected 0 because sampler {sampler!r} has none, got {eta}")
