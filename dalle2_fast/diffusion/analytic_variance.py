"""The error of a network's x0, from which DDPM's optimal variance follows.

Source: Bao et al., 2201.06503 ("Analytic-DPM"), theorem 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dalle2_fast.diffusion.process import GaussianDiffusion
    from dalle2_fast.diffusion.sampling import Net


@torch.no_grad()
def measure_x0_error(
    diffusion: GaussianDiffusion,
    net: Net,
    x0: Tensor,  # [B, C]
    *,
    points: int = 32,
    clip: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # float64 [timesteps], on the CPU
    """Measure the mean squared error of the predicted x0 at every discrete time.

    Args:
        diffusion: a process with discrete times.
        net: net(x, time) -> prediction [B, C], as in `GaussianDiffusion.sample`.
        x0: clean data; the more rows, the smaller the error of the measurement.
        points: number of times at which the error is measured; the times in between are interpolated
            linearly.
        clip: bound on the predicted x0, as in `GaussianDiffusion.sample`.
        generator: source of the noise; None is torch's default generator.

    Returns:
        The error per time, the argument `x0_error` of `GaussianDiffusion.sample`.

    Example:
        >>> from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine", 10), prediction="sample")
        >>> measure_x0_error(diffusion, lambda x, time: torch.zeros_like(x), torch.ones(4, 3), points=3)
        tensor([1., 1., 1., 1., 1., 1., 1., 1., 1., 1.], dtype=torch.float64)
    """
    batch, device = len(x0), x0.device
    steps = diffusion.schedule.timesteps
    times = torch.linspace(0, steps - 1, min(points, steps)).round().long()
    errors = []
    for t in times.tolist():
        t = torch.full((batch,), t, device=device)
        drawn_on = device if generator is None else generator.device
        noise = torch.randn(x0.shape, generator=generator, device=drawn_on, dtype=x0.dtype).to(device)
        x = diffusion.add_noise(x0, t, noise)
        output = net(diffusion.network_input(x, t), diffusion.schedule.net_time(t))
        predicted = diffusion.predict_x0(x, t, output.to(x.dtype))
        if clip is not None:
            predicted = predicted.clamp(-clip, clip)
        errors.append((predicted - x0).square().mean())
    errors = torch.stack(errors).cpu().double()
    step = torch.arange(steps)
    right = torch.searchsorted(times, step).clamp(min=1)
    share = (step - times[right - 1]) / (times[right] - times[right - 1])
    return torch.lerp(errors[right - 1], errors[right], share.double())
