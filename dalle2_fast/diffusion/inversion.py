"""DDIM inversion: from data to the noise that leads back to the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion._checks import check_data
from dalle2_fast.diffusion.preconditioning import for_steps
from dalle2_fast.diffusion.progress import Progress, with_progress
from dalle2_fast.diffusion.sampler_tables import inversion_ends, inversion_table
from dalle2_fast.diffusion.sampling import Net, on_device, resolve_guidance

if TYPE_CHECKING:
    from dalle2_fast.diffusion.process import GaussianDiffusion


@torch.no_grad()
def invert(
    diffusion: GaussianDiffusion,
    net: Net,
    x0: Tensor,  # [B, C, *]
    *,
    steps: int,
    guidance: float | Tensor | None = None,
    guidance_interval: Sequence[float] | None = None,  # (low, high) in log-SNR
    clip: float | None = None,
    refine: int = 0,
    progress: Progress = None,
    conditional_net: Net | None = None,
) -> Tensor:  # x_T [B, C, *]
    """DDIM inversion: find the x_T from which `sample(..., sampler="ddim", x_T=x_T)` returns about x0.

    The inversion starts at the last time at which `sample` calls the network, where it takes the data as free
    of noise, and is exact in the limit of many steps. It does not start nearer to the data, because there the
    error of a network, divided by sigma, would count as noise: with the checkpoint in the package, started at
    time 0, x_T came out 35 times too large.

    Args:
        diffusion: the process.
        net: as in `sample`.
        x0: clean data, floating.
        steps: the number of steps, >= 2, as in `sample`.
        guidance: as in `sample`.
        guidance_interval: (low, high) in log-SNR, as in `sample`.
        clip: as in `sample`; None for no bound.
        refine: the number of fixed point iterations per step, each of which calls net once more. A step uses
            the network's output where the step starts, but sampling uses the output where the step ends; an
            iteration repeats the step with the output at its end. With an exact network a few steps are then
            enough to lead back.
        progress: as in `sample`.
        conditional_net: as in `sample`.

    Returns:
        x_T, [B, C, *] in the dtype of x0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Source: Song et al., 2010.02502, section 4.3; Ramesh et al., 2204.06125, section 3.

    Example:
        >>> from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine"), prediction="sample")
        >>> invert(diffusion, lambda x, time: torch.ones_like(x), torch.ones(2, 3), steps=4).shape
        torch.Size([2, 3])
    """
    check_data(x0)
    if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
        raise ValueError(f"refine: expected an int of at least 0, got {refine!r}")
    times = diffusion.times(steps).flip(0)
    guided = resolve_guidance(diffusion, times, guidance, guidance_interval, conditional_net)
    table = inversion_table(diffusion.schedule, times)
    ends, factors = inversion_ends(diffusion.schedule, times)
    table, prediction, _ = for_steps(diffusion, table, times[:-1])
    ends, _, scales = for_steps(diffusion, ends, times)
    rows, net_times, table = on_device(diffusion, times, table, x0.shape[0], x0.device, x0.dtype)
    scales = None if scales is None else scales.to(x0.dtype).to(x0.device)
    ends = ends.to(table.dtype).to(table.device)  # rounded first: Apple's GPUs have no float64

    def step_from(x: Tensor, at: int, table: Tensor) -> Tensor:
        """Apply row `at` of a table with the network's output at x and times[at]."""
        seen = x if scales is None else x * scales[at]
        output = (net if guided[at] else conditional_net)(seen, net_times[at])
        if diffusion.variance == "learned_range":
            output = output[:, : x.shape[1]]
        return functional.diffusion_step(
            x, output, table, rows[at], guidance=guidance if guided[at] else None,
            prediction=prediction, clip=clip,
        )[0]  # fmt: skip

    x = x0  # state 0 is the data
    for step in with_progress(range(len(times)), progress):
        begin = x
        x = factors[0] * x if step == 0 else step_from(x, step - 1, table)
        for _ in range(refine):
            x = torch.add(step_from(x, step, ends), begin, alpha=factors[step])
    return x
