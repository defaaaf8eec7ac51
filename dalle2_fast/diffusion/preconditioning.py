"""Preconditioning of a network (EDM): x0 = skip x_t + gain net(scale x_t).

Where the noise vanishes, x_t is almost x0, and a network that predicts x0 itself has to copy its input. Here
`skip` passes the input on, and the network corrects it by about `gain`, which vanishes with the noise. Input
and target of the network have unit variance at every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dalle2_fast.diffusion.process import GaussianDiffusion


class Preconditioning(NamedTuple):
    """The factors of x0 = skip x_t + gain net(scale x_t), float64."""

    scale: Tensor
    skip: Tensor
    gain: Tensor


def precondition(log_snr: Tensor, sigma_data: float) -> Preconditioning:
    """The factors of EDM for a process with alpha^2 + sigma^2 = 1.

    With n^2 = sigma^2 + sigma_data^2 alpha^2, the variance of x_t, they are

        scale = 1 / n    skip = sigma_data^2 alpha / n^2    gain = sigma_data sigma / n

    For sigma_data = 1 the network predicts -v.

    Args:
        log_snr: log(alpha^2 / sigma^2), of any shape.
        sigma_data: standard deviation of the data, > 0.

    Source: Karras et al., "EDM", 2206.00364, table 1 and appendix B.6; the sigma of the paper is
    sigma / alpha here, and its state is x_t / alpha.

    Example:
        >>> scale, skip, gain = precondition(torch.tensor(9.0), sigma_data=0.5)
        >>> f"{scale:.2f} {skip:.2f} {gain:.2f}"
        '2.00 1.00 0.01'
    """
    log_snr = log_snr.to(torch.float64)
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    variance = sigma**2 + (sigma_data * alpha) ** 2
    return Preconditioning(
        variance.rsqrt(), sigma_data**2 * alpha / variance, sigma_data * sigma * variance.rsqrt()
    )


def for_steps(
    diffusion: GaussianDiffusion, table: Tensor, times: Tensor
) -> tuple[Tensor, str, Tensor | None]:
    """How the fused step computes x0 of what the network of this process predicts.

    The step's formula for v is x0 = alpha x - sigma v. With other numbers in the place of alpha and sigma,
    which the step uses for nothing else, it is the formula of a preconditioned network.

    Args:
        diffusion: the process.
        table: of a sampler, [steps, 8].
        times: where the network is called, [steps].

    Returns:
        The table, the prediction for `functional.diffusion_step`, and the factors of the network's input
        [steps] in float64, None if they are 1.
    """
    if diffusion.prediction != "edm":
        return table, diffusion.prediction, None
    scale, skip, gain = precondition(diffusion.schedule.log_snr(times.cpu()), diffusion.sigma_data)
    return torch.cat([torch.stack([skip, -gain], dim=1), table[:, 2:]], dim=1), "v_prediction", scale
