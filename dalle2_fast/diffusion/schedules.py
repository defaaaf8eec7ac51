"""Noise schedules: x_t = alpha(t) x0 + sigma(t) noise with alpha^2 + sigma^2 = 1.

A schedule is given by its log signal-to-noise ratio, log_snr(t) = log(alpha^2 / sigma^2), which falls in t;
alpha^2 = sigmoid(log_snr) and sigma^2 = sigmoid(-log_snr). Everything here is float64. Models and samplers
round once, when they use a value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The times that networks receive have one scale for all schedules, so that one time embedding fits all.
_NET_TIME_OF_ONE = 1000.0
# Improved DDPM (2102.09672, section 3.2) clips the betas, so that the last step is not singular.
_LARGEST_BETA = 0.999


class Schedule:
    """The interface of the two kinds of schedule. Build a schedule with `make_schedule`.

    Attributes:
        timesteps: the number of discrete times 0 .. timesteps - 1, or None for continuous times in [0, 1].
        name: the name that `make_schedule` takes.

    Example:
        >>> make_schedule("cosine", 10).alpha(torch.tensor([0, 9])).round(decimals=2)
        tensor([0.9900, 0.0000], dtype=torch.float64)
    """

    timesteps: int | None
    name: str

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at times t of any shape, float64."""
        raise NotImplementedError

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The time that has this log-SNR; for discrete times, the nearest one."""
        raise NotImplementedError

    def net_time(self, t: Tensor) -> Tensor:
        """The times as networks receive them, float32: the index of a discrete time, 1000 t of a continuous
        one."""
        raise NotImplementedError

    def uniform_time(self, u: Tensor) -> Tensor:
        """Map uniform numbers in [0, 1) to uniformly distributed times."""
        raise NotImplementedError

    def to_config(self) -> dict[str, object]:
        """The JSON-able arguments of `make_schedule` that rebuild this schedule."""
        raise NotImplementedError

    @staticmethod
    def from_config(config: dict[str, object]) -> Schedule:
        """Build the schedule that `to_config` described."""
        return make_schedule(**config)

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the signal at times t, float64."""
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise at times t, float64."""
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.to_config().items())
        return f"make_schedule({options})"


class DiscreteSchedule(Schedule):
    """Times 0 .. T-1 with alpha^2(t) = prod_{i <= t} (1 - beta_i).

    Args:
        name: the name of the schedule.
        betas: float64 [T] in (0, 1).
        options: the arguments of `make_schedule` that made the betas, for `to_config`.

    Source: Ho et al., 2006.11239, equation 4.

    Example:
        >>> schedule = DiscreteSchedule("linear", torch.tensor([0.1, 0.2], dtype=torch.float64))
        >>> schedule.alpha(torch.tensor([0, 1])) ** 2
        tensor([0.9000, 0.7200], dtype=torch.float64)
    """

    def __init__(self, name: str, betas: Tensor, options: dict[str, float] | None = None):
        self.name, self.timesteps, self._options = name, len(betas), dict(options or {})
        self.betas = betas
        log_alpha_squared = torch.log1p(-betas).cumsum(0)
        self._log_snr = {torch.device("cpu"): log_alpha_squared - torch.log(-torch.expm1(log_alpha_squared))}

    def _table(self, device: torch.device) -> Tensor:
        # One copy per device is kept, because a copy in every step would make the host wait.
        if device not in self._log_snr:
            self._log_snr[device] = self._log_snr[torch.device("cpu")].to(device)
        return self._log_snr[device]

    def log_snr(self, t: Tensor) -> Tensor:
        return self._table(t.device)[t.long()]

    def time_at(self, log_snr: Tensor) -> Tensor:
        rising = self._table(log_snr.device).flip(0)
        wanted = log_snr.to(torch.float64).contiguous()
        return self.timesteps - 1 - torch.searchsorted((rising[1:] + rising[:-1]) / 2, wanted)

    def net_time(self, t: Tensor) -> Tensor:
        return t.to(torch.float32)

    def uniform_time(self, u: Tensor) -> Tensor:
        return (u * self.timesteps).long().clamp(max=self.timesteps - 1)  # u * T can round up to T

    def to_config(self) -> dict[str, object]:
        return {"name": self.name, "timesteps": self.timesteps, **self._options}


class ContinuousSchedule(Schedule):
    """Times in [0, 1], with a log-SNR from log_snr_max at time 0 down to log_snr_min at time 1.

    Args:
        name: "continuous_cosine" (alpha = cos(pi t / 2), cut at the two bounds) or "continuous_log_linear"
            (log-SNR linear in t).
        log_snr_min: log-SNR at time 1, before the shift.
        log_snr_max: log-SNR at time 0, before the shift.
        shift: added to the log-SNR; 2 log(64 / resolution) suits images larger than 64.

    Raises:
        ValueError: the bounds are not finite and ordered, or the shift is not finite.

    Source: Hoogeboom et al., 2301.11093, section 2.1, for the cosine and its shift; Kingma et al.,
    2107.00630, for the linear log-SNR.

    Example:
        >>> schedule = ContinuousSchedule("continuous_log_linear", log_snr_min=-10.0, log_snr_max=10.0)
        >>> schedule.log_snr(torch.tensor([0.0, 0.5, 1.0]))
        tensor([ 10.,   0., -10.], dtype=torch.float64)
    """

    timesteps = None

    def __init__(self, name: str, log_snr_min: float = -15.0, log_snr_max: float = 15.0, shift: float = 0.0):
        if not (math.isfinite(log_snr_min) and math.isfinite(log_snr_max) and log_snr_min < log_snr_max):
            raise ValueError(
                f"log_snr_min, log_snr_max: expected finite numbers, the first smaller, "
                f"got {log_snr_min}, {log_snr_max}"
            )
        if not math.isfinite(shift):
            raise ValueError(f"shift: expected a finite number, got {shift}")
        self.name, self.log_snr_min, self.log_snr_max, self.shift = name, log_snr_min, log_snr_max, shift
        # On the arc of the cosine schedule, log-SNR = -2 log tan(angle).
        self._angle_at_0 = math.atan(math.exp(-log_snr_max / 2))
        self._angle_at_1 = math.atan(math.exp(-log_snr_min / 2))

    def log_snr(self, t: Tensor) -> Tensor:
        t = t.to(torch.float64)
        if self.name == "continuous_log_linear":
            return self.log_snr_max + t * (self.log_snr_min - self.log_snr_max) + self.shift
        angle = self._angle_at_0 + t * (self._angle_at_1 - self._angle_at_0)
        return -2 * torch.log(torch.tan(angle)) + self.shift

    def time_at(self, log_snr: Tensor) -> Tensor:
        unshifted = log_snr.to(torch.float64) - self.shift
        if self.name == "continuous_log_linear":
            t = (self.log_snr_max - unshifted) / (self.log_snr_max - self.log_snr_min)
        else:
            angle = torch.atan(torch.exp(-unshifted / 2))
            t = (angle - self._angle_at_0) / (self._angle_at_1 - self._angle_at_0)
        return t.clamp(0, 1)

    def net_time(self, t: Tensor) -> Tensor:
        return (t * _NET_TIME_OF_ONE).to(torch.float32)

    def uniform_time(self, u: Tensor) -> Tensor:
        return u.to(torch.float64)

    def to_config(self) -> dict[str, object]:
        return {
            "name": self.name,
            "timesteps": None,
            "log_snr_min": self.log_snr_min,
            "log_snr_max": self.log_snr_max,
            "shift": self.shift,
        }


def _cosine_betas(timesteps: int) -> Tensor:
    """Nichol and Dhariwal, 2102.09672, equation 17."""
    grid = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alpha_squared = torch.cos((grid + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return 1 - alpha_squared[1:] / alpha_squared[:-1]


def _linear_betas(timesteps: int, beta_start: float | None = None, beta_end: float | None = None) -> Tensor:
    """1e-4 to 0.02 for 1000 steps (Ho et al., 2006.11239); scaled for others, to end at the same noise."""
    start = 1e-4 * 1000 / timesteps if beta_start is None else beta_start
    end = 0.02 * 1000 / timesteps if beta_end is None else beta_end
    return torch.linspace(start, end, timesteps, dtype=torch.float64)


def _scaled_linear_betas(
    timesteps: int, beta_start: float | None = None, beta_end: float | None = None
) -> Tensor:
    """Linear in sqrt(beta): 0.00085 to 0.012 for 1000 steps (Rombach et al., 2112.10752), or scaled."""
    start = 0.00085 * 1000 / timesteps if beta_start is None else beta_start
    end = 0.012 * 1000 / timesteps if beta_end is None else beta_end
    return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2


_BETAS = {"cosine": _cosine_betas, "linear": _linear_betas, "scaled_linear": _scaled_linear_betas}
_CONTINUOUS = ("continuous_cosine", "continuous_log_linear")


def make_schedule(name: str = "cosine", timesteps: int | None = 1000, **options: float) -> Schedule:
    """Build the noise schedule of this name.

    Args:
        name: "cosine", "linear" or "scaled_linear" with discrete times; "continuous_cosine" or
            "continuous_log_linear" with times in [0, 1].
        timesteps: the number of discrete times, >= 1; continuous schedules have none and ignore it.
        options: beta_start and beta_end in (0, 1) for the two linear ones; log_snr_min, log_snr_max and shift
            for the continuous ones.

    Returns:
        A `DiscreteSchedule` or a `ContinuousSchedule`.

    Raises:
        TypeError: an unknown option, or timesteps is not an int.
        ValueError: an unknown name, or a value out of range.

    Example:
        >>> make_schedule("linear", 100)
        make_schedule(name='linear', timesteps=100)
    """
    if name not in _BETAS and name not in _CONTINUOUS:
        names = ", ".join(map(repr, (*_BETAS, *_CONTINUOUS)))
        raise ValueError(f"name: expected one of {names}, got {name!r}")
    known = ("log_snr_min", "log_snr_max", "shift") if name in _CONTINUOUS else ("beta_start", "beta_end")
    unknown = set(options) - set(known if name != "cosine" else ())
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: not an option of schedule {name!r}")
    if name in _CONTINUOUS:
        return ContinuousSchedule(name, **options)
    if not isinstance(timesteps, int) or isinstance(timesteps, bool):
        raise TypeError(f"timesteps: expected an int (schedule {name!r} is discrete), got {timesteps!r}")
    if timesteps < 1:
        raise ValueError(f"timesteps: expected at least 1, got {timesteps}")
    for option, value in options.items():
        if not 0 < value < 1:
            raise ValueError(f"{option}: expected a number between 0 and 1, got {value}")
    with torch.device("cpu"):  # also where a model is built on the "meta" device: the betas are no parameters
        return DiscreteSchedule(name, _BETAS[name](timesteps, **options).clamp(max=_LARGEST_BETA), options)
