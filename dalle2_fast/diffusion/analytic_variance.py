"""The error of a network's x0, from which ddpm's optimal variance follows (Bao et al., 2201.06503)."""

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
    """Mean squared error of the predicted x0 at every discrete time, measured at `points` of them and linear
    in between: the x0_error of `sampler_table`.

    clip bounds the predicted x0, as in `sample`.
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
        output = net(x, diffusion.schedule.net_time(t))
        predicted = diffusion.predict_x0(x, t, output.to(x.dtype))
        if clip is not None:
            predicted = predicted.clamp(-clip, clip)
        errors.append((predicted - x0).square().mean())
    errors = torch.stack(errors).cpu().double()
    step = torch.arange(steps)
    right = torch.searchsorted(times, step).clamp(min=1)
    share = (step - times[right - 1]) / (times[right] - times[right - 1])
    return torch.lerp(errors[right - 1], errors[right], share.double())
