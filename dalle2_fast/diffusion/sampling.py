"""Drawing from a Gaussian diffusion process: samples, inpainting, and DDIM backwards, from data to noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion import sampler_tables
from dalle2_fast.diffusion.inpainting import Inpainting, visits
from dalle2_fast.diffusion.schedules import Schedule
from dalle2_fast.ops import _checks
from dalle2_fast.seeds import derived_seeds

Net = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[..., Iterable] | bool | None

# The counter of the noise that sampling starts from: no row of a table, so it is independent of every step's
# noise and the same for every number of steps.
INITIAL_NOISE = 2**31 - 1


class Sampling:
    """The part of GaussianDiffusion that draws."""

    schedule: Schedule
    prediction: str
    variance: str

    @torch.no_grad()
    def sample(
        self,
        net: Net,
        shape: Sequence[int],  # (B, C, *)
        *,
        seeds: Tensor,  # int64 [B]
        steps: int,
        sampler: str = "ddim",
        eta: float = 0.0,
        spacing: str = "time",
        x0_error: Tensor | None = None,  # [timesteps]
        guidance: float | Tensor | None = None,
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
        last_net: Net | None = None,
    ) -> Tensor:  # x0 [B, C, *]
        """Draw samples; each depends on its own seed only, not on the batch around it.

        Args:
            net: net(x, time) with x [B, C, *] of `dtype`, time float32 [B] -> output [B, ...]; with guidance
                [2B, ...], the B conditional rows first, then the B unconditional ones. 2C channels with a
                learned range.
            seeds: of x_T and of every step's noise.
            steps: calls of net; at most the schedule's timesteps.
            sampler, eta: see `samplers.sampler_table`. A learned variance is used by "ddpm"; the others
                ignore it.
            spacing: of the steps: "time" or "log_snr", see `samplers.step_times`.
            x0_error: the network's, at every discrete time, for ddpm's optimal variance, see `sampler_table`.
            guidance, guidance_rescale, clip, dynamic_threshold: see `functional.diffusion_step`.
            x_T: where to begin instead of at noise.
            start: skip this many of the steps; then x_T is required, as of `times(steps, spacing)[start]`
                (see `add_noise`).
            known, mask: data to keep; mask is 1 (True) where it is repainted, and where it is 0 the data come
                out exactly as they are.
            resample, jump: with `known`, go through each stretch of `jump` steps `resample` times, noised
                back in between: 10 x 10 in RePaint (2201.09865), whose new parts then fit the known ones.
            progress: True for a tqdm bar, or a function of (iterable, total=...) that gives the iterable
                back.
            device: seeds' device when None.
            dtype: of x; the update's maths is float32 (float64 for float64) in any case.
            callback: called as callback(step, x_next, x0) after every step.
            last_net: called in place of net in the last step.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape or range.
        """
        batch, channels, *_ = shape = _check_shape(shape)
        _checks.seeds_and_step(seeds, 0, batch)
        device = seeds.device if device is None else torch.device(device)
        times = self.times(steps, spacing)
        if x0_error is not None:
            if x0_error.shape != (self.schedule.timesteps,):
                expected = f"[timesteps] = ({self.schedule.timesteps},)"
                raise ValueError(f"x0_error: expected {expected}, got {tuple(x0_error.shape)}")
            x0_error = x0_error.cpu()[times]
        table = sampler_tables.sampler_table(
            self.schedule, times, sampler, variance=self.variance, eta=eta, x0_error=x0_error
        )
        start = 0 if start is None else start
        if not 0 <= start < steps:
            raise ValueError(f"start: expected 0 <= start < steps = {steps}, got {start}")
        if start > 0 and x_T is None:
            raise ValueError("x_T: expected the state to start from because start > 0, got None")
        seeds = seeds.to(device)
        if x_T is None:
            x = functional.sample_noise(seeds, INITIAL_NOISE, shape, dtype=dtype)
        elif tuple(x_T.shape) != shape:
            raise ValueError(f"x_T: expected {shape}, got {tuple(x_T.shape)}")
        else:
            x = x_T.to(device, dtype)

        inpainting = None
        if known is not None:
            inpainting = Inpainting(self.schedule, times, known, mask, shape, device, x.dtype)
            x = inpainting.keep(x, start, seeds)
            order = visits(start, steps, resample, jump)
        elif mask is not None or resample != 1:
            raise ValueError("known: expected the data to keep beside mask and resample, got None")
        else:
            order = [(step, 0) for step in range(start, steps)]

        noisy = bool((table[:, 5] > 0).any())
        learned_range = self.variance == "learned_range"
        use_range = learned_range and sampler == "ddpm"
        # Everything that changes with the step is on the device before the loop: no copy, no wait within.
        rows, net_times, table = self._on_device(times, table, batch, device, dtype)
        previous_x0, state = None, start
        for step, number in _with_progress(order, progress):
            own = derived_seeds(seeds, number)
            if step < state:  # the stretch begins anew
                x = inpainting.keep(inpainting.back(x, state, step, own), step, own)
                previous_x0 = None
            state = step + 1
            denoise = last_net if last_net is not None and step == steps - 1 else net
            output = denoise(x, net_times[step])
            if learned_range and not use_range:
                output = output[:, :channels]
            x, x0 = functional.diffusion_step(
                x, output, table, rows[step], seeds=own if noisy else None, guidance=guidance,
                guidance_rescale=guidance_rescale, prediction=self.prediction, clip=clip,
                dynamic_threshold=dynamic_threshold, learned_range=use_range, previous_x0=previous_x0,
            )  # fmt: skip
            if inpainting is not None:
                x = inpainting.keep(x, state, own)
            if sampler == "dpm++":
                previous_x0 = x0
            if callback is not None:
                callback(step, x, x0)
        return x

    def times(self, steps: int, spacing: str = "time") -> Tensor:
        """The falling times at which `sample` calls the network, [steps]."""
        return sampler_tables.step_times(self.schedule, steps, spacing)

    @torch.no_grad()
    def invert(
        self,
        net: Net,
        x0: Tensor,  # [B, C, *]
        *,
        steps: int,
        guidance: float | Tensor | None = None,
        clip: float | None = None,
        refine: int = 0,
        progress: Progress = None,
    ) -> Tensor:  # x_T [B, C, *]
        """DDIM inversion: the x_T from which `sample(..., sampler="ddim", x_T=x_T)` comes back to about x0.

        steps >= 2, as in `sample`; net, guidance and clip likewise. It begins at the last time at which
        `sample` calls the network, with the data there free of noise, and is exact in the limit of many
        steps. (Nearer to the data a network's error, divided by sigma, would count as noise: with the
        checkpoint in the package, begun at time 0, x_T came out 35 times too large.)

        refine: each step uses the network's answer where it begins, but the way back uses that where it ends;
            so many times it is made again with the noise found where it ended (a fixed point iteration), each
            for one more call a step. With an exact network a few steps then lead back, too.

        Song et al., 2010.02502, section 4.3; Ramesh et al., 2204.06125, section 3.
        """
        check_data(x0)
        if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
            raise ValueError(f"refine: expected an int of at least 0, got {refine!r}")
        times = self.times(steps).flip(0)
        table = sampler_tables.inversion_table(self.schedule, times)
        ends, keeps = sampler_tables.inversion_ends(self.schedule, times)
        rows, net_times, table = self._on_device(times, table, x0.shape[0], x0.device, x0.dtype)
        ends, x = ends.to(table), x0  # state 0 is the data
        for step in _with_progress(range(len(times)), progress):
            begin, before = x, step - 1
            if step == 0:
                x = keeps[0] * x
            else:
                x, _ = self._inversion_step(net, x, net_times[before], table, rows[before], guidance, clip)
            for _ in range(refine):
                noise, _ = self._inversion_step(net, x, net_times[step], ends, rows[step], guidance, clip)
                x = torch.add(noise, begin, alpha=keeps[step])
        return x

    def _inversion_step(
        self, net: Net, x: Tensor, net_time: Tensor, table: Tensor, row: Tensor,
        guidance: float | Tensor | None, clip: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output = net(x, net_time)
        if self.variance == "learned_range":
            output = output[:, : x.shape[1]]
        return functional.diffusion_step(
            x, output, table, row, guidance=guidance, prediction=self.prediction, clip=clip
        )

    def _on_device(
        self, times: Tensor, table: Tensor, batch: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row numbers [steps], the network's times [steps, B] and the table, on the device and rounded."""
        net_times = self.schedule.net_time(times).to(device)[:, None].expand(-1, batch)
        return torch.arange(len(times), device=device), net_times, table.to(wide_dtype(dtype)).to(device)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] beside `like` [B, ...]."""
    return value.reshape(-1, *([1] * (like.dim() - 1)))


def check_data(x0: Tensor) -> None:
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        came = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"x0: expected a floating-point tensor [B, C, ...], got {came}")
    if x0.dim() < 2:
        raise ValueError(f"x0: expected [B, C, ...] with at least 2 dimensions, got {tuple(x0.shape)}")


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(size) for size in shape)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape: expected (B, C, ...) of sizes >= 0, got {shape}")
    return shape


def _with_progress(steps: Sequence, progress: Progress) -> Iterable:
    if progress is None or progress is False:
        return steps
    if progress is True:
        from tqdm import tqdm

        progress = tqdm
    return progress(steps, total=len(steps))
