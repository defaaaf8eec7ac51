"""The values that options of a diffusion process may have.

This file does not import torch, so that the command line can list and check them without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PREDICTIONS = ("epsilon", "sample", "v_prediction", "edm")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
WEIGHTINGS = ("uniform", "simple", "x0", "v", "min_snr")
SAMPLERS = ("ddpm", "ddim", "dpm++", "consistency")
"""The samplers that `sampler_table` knows, by the names that the argument `sampler` takes."""
SPACINGS = ("time", "log_snr", "trailing")


def check_guidance_interval(interval: Sequence[float] | None, name: str) -> tuple[float, float] | None:
    """Return an interval of log-SNR as two floats; None stays None.

    Args:
        interval: (low, high), finite numbers with low <= high, or None.
        name: the name of the argument, for the message.

    Raises:
        TypeError: it is no pair of numbers.
        ValueError: the numbers are not finite, or high is below low.

    Example:
        >>> check_guidance_interval([-4, 1], "guidance_interval")
        (-4.0, 1.0)
    """
    if interval is None:
        return None
    pair = isinstance(interval, (tuple, list)) and len(interval) == 2
    if not pair or not all(type(bound) in (int, float) for bound in interval):
        raise TypeError(f"{name}: expected two numbers (low, high) or None, got {interval!r}")
    low, high = map(float, interval)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name}: expected finite numbers (low, high) with low <= high, got {interval!r}")
    return low, high
