"""Data whose optimal network is known: independent normal numbers with mean MEAN and deviation DEVIATION."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_fast.diffusion import Schedule

MEAN, DEVIATION = 0.3, 0.5
SIGMA_DATA = 0.5  # the default of GaussianDiffusion


def data(batch: int = 6, channels: int = 3, size: int = 4) -> Tensor:
    """float64 [batch, channels, size, size], the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, size, size)
    return MEAN + DEVIATION * torch.randn(shape, generator=generator, dtype=torch.float64)


def best_x0(x: Tensor | float, alpha: Tensor | float, sigma: Tensor | float) -> Tensor | float:
    """E[x0 | x_t = x]."""
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def end_of_flow(x: Tensor | float, alpha: Tensor | float, sigma: Tensor | float) -> Tensor | float:
    """The x0 to which the deterministic flow takes x_t = x, which a consistency network learns."""
    return MEAN + DEVIATION * (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2) ** 0.5


def exact_net(schedule: Schedule, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The optimal network for this data, in float64, for one of the predictions.

    With "edm" the formulas are those of the paper (2206.00364, table 1), in terms of its noise level s and of
    its state y = x_t / alpha, of which the network sees c_in y.
    """

    def net(x: Tensor, net_time: Tensor) -> Tensor:
        t = net_time.double() if schedule.timesteps else net_time.double() / 1000
        shape = (-1, *([1] * (x.dim() - 1)))
        alpha, sigma = schedule.alpha(t).reshape(shape), schedule.sigma(t).reshape(shape)
        if prediction == "edm":
            s = sigma / alpha
            y = x.double() * (s**2 + SIGMA_DATA**2).sqrt()
            c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
            c_out = s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt()
            return ((best_x0(alpha * y, alpha, sigma) - c_skip * y) / c_out).to(x.dtype)
        x0 = best_x0(x.double(), alpha, sigma)
        noise = (x.double() - alpha * x0) / sigma
        v = alpha * noise - sigma * x0
        return {"sample": x0, "epsilon": noise, "v_prediction": v}[prediction].to(x.dtype)

    return net
