"""Sampling from a Gaussian diffusion process: one loop over the rows of a sampler's table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion._checks import check_shape
from dalle2_fast.diffusion.graphs.plan import Net, SamplingPlan, StepOptions, make_step
from dalle2_fast.diffusion.inpainting import Inpainting, resampling_order
from dalle2_fast.diffusion.preconditioning import for_steps
from dalle2_fast.diffusion.progress import Progress, with_progress
from dalle2_fast.diffusion.sampler_tables import guided_steps, sampler_table, spacing_of
from dalle2_fast.ops import _checks
from dalle2_fast.ops._dtypes import compute_dtype
from dalle2_fast.seeds import derived_seeds

if TYPE_CHECKING:
    from dalle2_fast.diffusion.graphs.cache import StageGraphs
    from dalle2_fast.diffusion.process import GaussianDiffusion

# The Philox counter of the initial noise. No row of a table has this number, so the initial noise is
# independent of the noise of every step, and it is the same for every number of steps.
INITIAL_NOISE = 2**31 - 1


@torch.no_grad()
def sample(
    diffusion: GaussianDiffusion,
    net: Net,
    shape: Sequence[int],  # (B, C, *)
    *,
    seeds: Tensor,  # int64 [B]
    steps: int,
    sampler: str = "ddim",
    eta: float = 0.0,
    spacing: str | None = None,
    x0_error: Tensor | None = None,  # [timesteps]
    guidance: float | Tensor | None = None,
    guidance_interval: Sequence[float] | None = None,  # (low, high) in log-SNR
    guidance_rescale: float = 0.0,
    clip: float | None = 1.0,
    dynamic_threshold: float | None = None,
    x_T: Tensor | None = None,  # [B, C, *]
    start: int | None = None,
    known: Tensor | None = None,  # [B, C, *]
    mask: Tensor | None = None,  # bool, broadcasts to [B, C, *]
    resample: int = 1,
    jump: int = 10,
    progress: Progress = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    conditional_net: Net | None = None,
    last_net: Net | None = None,
    graphs: StageGraphs | None = None,
) -> Tensor:  # x0 [B, C, *]
    """Draw samples. Each sample depends on its seed only, not on the other samples of the batch.

    Args:
        diffusion: the process.
        net: called as net(x, time) with x [B, C, *] of `dtype` and time float32 [B]. It returns [B, C, *];
            with guidance 2B rows, first the B conditional ones, then the B unconditional ones; with a learned
            range 2C channels.
        shape: shape of the samples, (B, C, *).
        seeds: seeds of x_T and of the noise of every step.
        steps: the number of steps; at most the timesteps of the schedule.
        sampler: "ddpm", "ddim", "dpm++" or "consistency", see `sampler_table`. Only "ddpm" uses a learned
            variance; the others ignore it.
        eta: noise of "ddim" in [0, 1], see `sampler_table`.
        spacing: "time", "log_snr" or "trailing", see `step_times`; None is "trailing" for "consistency" and
            "time" for the others.
        x0_error: mean squared error of the network's x0 at every discrete time, for the optimal variance of
            "ddpm", see `sampler_table` and `measure_x0_error`.
        guidance: guidance weight, a number or [B], see `functional.diffusion_step`; None if net returns no
            unconditional rows.
        guidance_interval: (low, high) in log-SNR, log(alpha^2 / sigma^2): only the steps whose time has
            low <= log-SNR < high have guidance, the other ones call conditional_net. None: all steps.
        guidance_rescale: number in [0, 1], see `functional.diffusion_step`.
        clip: bound on the predicted x0; None for no bound.
        dynamic_threshold: quantile in (0, 1], see `functional.diffusion_step`.
        x_T: the state at which sampling starts; None is noise.
        start: the number of steps to skip. Above 0 it requires x_T, the state at
            `times(steps, spacing)[start]` (see `add_noise`).
        known: data to keep, in the range of x0.
        mask: 1 (True) where `known` is repainted; where it is 0, `known` comes out unchanged.
        resample: with `known`, how often each segment of `jump` steps is made, noised back in between.
            RePaint (2201.09865) uses 10 with jump 10; the new parts then fit the known ones.
        jump: the number of steps in a segment of `resample`.
        progress: True for a tqdm bar, or a function that is called as progress(iterable, total=...) and
            returns an iterable of the same steps.
        device: where to sample; None is the device of seeds.
        dtype: dtype of x. The update is computed in float32 (float64 for float64) regardless.
        callback: called as callback(step, x_next, x0) after every step.
        conditional_net: called in place of net in the steps outside guidance_interval; it returns the B
            conditional rows alone, in half the time.
        last_net: called in the last step, in place of net or conditional_net, and returns as many rows.
        graphs: replays the steps as CUDA graphs where it can; None for none. The networks are then
            ConditionedNets.

    Returns:
        The samples x0, [B, C, *] of `dtype`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Source: the papers of the samplers, see `sampler_table`; Kynkäänniemi et al., 2404.07724, for the
    interval of guidance (sigma in the paper is exp(-log-SNR / 2)); Lugmayr et al., 2201.09865, for
    inpainting.

    Example:
        >>> from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine"), prediction="sample")
        >>> sample(diffusion, lambda x, time: torch.zeros_like(x), (1, 3), seeds=torch.tensor([0]), steps=4)
        tensor([[0., 0., 0.]])
    """
    batch, channels, *_ = shape = check_shape(shape)
    _checks.seeds_and_step(seeds, 0, batch)
    device = seeds.device if device is None else torch.device(device)
    times = diffusion.times(steps, spacing_of(sampler) if spacing is None else spacing)
    table = _table(diffusion, times, sampler, eta, x0_error)
    guided = resolve_guidance(diffusion, times, guidance, guidance_interval, conditional_net)
    start = 0 if start is None else start
    if not 0 <= start < steps:
        raise ValueError(f"start: expected 0 <= start < steps = {steps}, got {start}")
    if start > 0 and x_T is None:
        raise ValueError("x_T: expected the state to start from because start > 0, got None")
    # The first step of a multistep sampler has no step before it, wherever it starts.
    table[start, 3], table[start, 4] = table[start, 3] + table[start, 4], 0.0
    seeds = seeds.to(device)
    if x_T is None:
        x = functional.sample_noise(seeds, INITIAL_NOISE, shape, dtype=dtype)
    elif tuple(x_T.shape) != shape:
        raise ValueError(f"x_T: expected {shape}, got {tuple(x_T.shape)}")
    else:
        x = x_T.to(device, dtype)

    inpainting = None
    if known is not None:
        inpainting = Inpainting(diffusion.schedule, times, known, mask, shape, device, x.dtype)
        x = inpainting.with_known(x, start, seeds)
    elif mask is not None or resample != 1:
        raise ValueError("known: expected the data to keep, because mask or resample is given, got None")
    order = resampling_order(start, steps, resample, jump)

    use_range = diffusion.variance == "learned_range" and sampler == "ddpm"
    nets = [(net, True) if has_guidance else (conditional_net, False) for has_guidance in guided]
    if last_net is not None:
        nets[-1] = last_net, nets[-1][1]
    kinds = {(id(kind), has_guidance): (kind, has_guidance) for kind, has_guidance in nets}
    position = {key: index for index, key in enumerate(kinds)}
    # Everything that changes from step to step is on the device before the loop, so that no step has to wait
    # for a copy.
    table, prediction, scales = for_steps(diffusion, table, times)
    options = StepOptions(
        prediction=prediction, clip=clip, dynamic_threshold=dynamic_threshold,
        guidance_rescale=guidance_rescale, learned_range=use_range,
        drop_variance=diffusion.variance == "learned_range" and not use_range,
        noisy=bool((table[:, 5] > 0).any()), multistep=sampler == "dpm++",
    )  # fmt: skip
    rows, net_times, table = on_device(diffusion, times, table, batch, device, dtype)
    plan = SamplingPlan(
        x, seeds, table, net_times, tuple(kinds.values()),
        tuple(position[id(kind), has_guidance] for kind, has_guidance in nets),
        guidance, options, start, inpainting, None if scales is None else scales.to(dtype).to(device),
    )  # fmt: skip
    if graphs is not None:
        made = graphs.run(plan, progress, resampled=resample > 1, has_callback=callback is not None)
        if made is not None:
            return made
    return _sample_eagerly(plan, rows, with_progress(order, progress), callback)


def _sample_eagerly(
    plan: SamplingPlan,
    rows: Tensor,  # int64 [steps]
    order: Iterable[tuple[int, int]],
    callback: Callable[[int, Tensor, Tensor], None] | None,
) -> Tensor:
    """x0 of a plan, step after step in any order."""
    x, previous_x0, state = plan.x, None, plan.start
    for step, repetition in order:
        seeds = derived_seeds(plan.seeds, repetition)
        if step < state:  # another pass over this segment
            x = plan.inpainting.renoise(x, state, step, seeds)
            x = plan.inpainting.with_known(x, step, seeds)
            previous_x0 = None
        state = step + 1
        net, guided = plan.nets[plan.choice[step]]
        x, x0 = make_step(
            net, x, plan.times[step], plan.table, rows[step], plan.options, seeds=seeds,
            guidance=plan.guidance if guided else None, previous_x0=previous_x0,
            scale=None if plan.scales is None else plan.scales[step],
        )  # fmt: skip
        if plan.inpainting is not None:
            x = plan.inpainting.with_known(x, state, seeds)
        if plan.options.multistep:
            previous_x0 = x0
        if callback is not None:
            callback(step, x, x0)
    return x


def resolve_guidance(
    diffusion: GaussianDiffusion,
    times: Tensor,  # [steps]
    guidance: float | Tensor | None,
    interval: Sequence[float] | None,
    conditional_net: Net | None,
) -> list[bool]:
    """For each step, whether net is called; the other steps call conditional_net and have no guidance.

    Raises:
        TypeError, ValueError: the interval is none, or it leaves out steps and conditional_net is None.
    """
    guided = guided_steps(diffusion.schedule, times, interval)
    if guidance is None:  # net has no unconditional rows that could be left out
        return [True] * len(guided)
    if conditional_net is None and not all(guided):
        raise ValueError(
            "conditional_net: expected a network for the steps outside guidance_interval, got None"
        )
    return guided


def _table(
    diffusion: GaussianDiffusion, times: Tensor, sampler: str, eta: float, x0_error: Tensor | None
) -> Tensor:
    schedule = diffusion.schedule
    if x0_error is not None:
        if x0_error.shape != (schedule.timesteps,):
            expected = f"[timesteps] = ({schedule.timesteps},)"
            raise ValueError(f"x0_error: expected {expected}, got {tuple(x0_error.shape)}")
        x0_error = x0_error.cpu()[times]
    return sampler_table(schedule, times, sampler, variance=diffusion.variance, eta=eta, x0_error=x0_error)


def on_device(
    diffusion: GaussianDiffusion,
    times: Tensor,
    table: Tensor,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers [steps], the network's times [steps, B] and the table, rounded and on the device."""
    net_times = diffusion.schedule.net_time(times).to(device)[:, None].expand(-1, batch)
    return torch.arange(len(times), device=device), net_times, table.to(compute_dtype(dtype)).to(device)
