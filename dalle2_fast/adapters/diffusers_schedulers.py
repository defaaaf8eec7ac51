"""diffusers' UnCLIP, DDPM and DDIM schedulers with `step` as one fused op.

Everything but `step` is theirs: config, set_timesteps, add_noise, from_config. A step is one row of a table
that lies on the device, so it launches one kernel and copies nothing to it.

Noise: by default each sample's seed is drawn from the generator (or the list of generators, one a sample)
that `step` gets, and the op draws the noise from the seed. The same generator gives the same image every
time, but not the image that diffusers' own scheduler makes of it. With `noise=` the step is theirs number for
number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle2_fast import functional


class _Tables(NamedTuple):
    """Rows of `functional.diffusion_step` on one device, for noise that the op draws and noise it is given.

    Given noise takes the place of previous_x0, with std as its coefficient.
    """

    rows: dict[tuple[int, int], int]  # (timestep, previous one) -> row
    std: list[float]
    drawn: Tensor  # [rows, 8]
    given: Tensor  # [rows, 8]


class _FusedSteps:
    """What the three share. `_row`, the coefficients of a step, is each one's own."""

    def _row(self, timestep: int, previous: int, eta: float) -> tuple[float, ...]:
        raise NotImplementedError

    # -- times without waiting for the device ----------------------------------------------------------------

    def _host_times(self) -> list[int]:
        """self.timesteps as ints, read once."""
        times = self.timesteps
        known = self.__dict__.get("_known_times")
        if known is None or known[0] is not times or known[1] != times._version:
            known = self._known_times = (times, times._version, [int(time) for time in times.tolist()])
            self._tables = {}
        return known[2]

    def _int_of(self, timestep: int | Tensor) -> int:
        """A loop over self.timesteps gets views of it: the place of one says its value."""
        host, times = self._host_times(), self.timesteps
        if isinstance(timestep, Tensor) and timestep.numel() == 1 and timestep.dtype == times.dtype:
            place, over = divmod(timestep.data_ptr() - times.data_ptr(), times.element_size())
            same = timestep.untyped_storage().data_ptr() == times.untyped_storage().data_ptr()
            if same and over == 0 and 0 <= place < len(host):
                return host[place]
        return int(timestep)

    def _next_in_chain(self, timestep: int) -> int:
        """The timestep after this one in self.timesteps, -1 after the last."""
        host = self._host_times()
        if timestep not in host:
            raise ValueError(f"timestep: expected one of scheduler.timesteps, got {timestep}")
        place = host.index(timestep)
        return host[place + 1] if place + 1 < len(host) else -1

    def _alpha_squared(self, time: int) -> float:
        """alphas_cumprod in float64: in float32, 1 - alphas_cumprod[0] is off by a thousandth."""
        if "_alphas_squared" not in self.__dict__:
            self._alphas_squared = (1 - self.betas.double()).cumprod(0).tolist()
        return self._alphas_squared[time]

    def _chain(self, host: list[int]) -> list[tuple[int, int]]:
        """The steps that a loop over self.timesteps will take."""
        return [*zip(host, [*host[1:], -1], strict=True)]

    def _table(self, step: tuple[int, int], like: Tensor, eta: float) -> tuple[_Tables, int]:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        host = self._host_times()
        key = (like.device, dtype, eta)
        tables = self._tables.get(key)
        if tables is None or step not in tables.rows:
            known = [] if tables is None else list(tables.rows)
            chain = self._chain(host) if self.num_inference_steps else []
            steps = list(dict.fromkeys([*known, *chain, step]))
            table = torch.tensor([self._row(*one, eta) for one in steps], dtype=torch.float64)
            given = table.clone()
            given[:, 4], given[:, 5] = table[:, 5], 0.0
            rows = {one: row for row, one in enumerate(steps)}
            tables = _Tables(rows, table[:, 5].tolist(), *(t.to(like.device, dtype) for t in (table, given)))
            self._tables[key] = tables
        return tables, tables.rows[step]

    # -- the step --------------------------------------------------------------------------------------------

    def _fused_step(
        self, model_output: Tensor, sample: Tensor, step: tuple[int, int], generator: Any,
        noise: Tensor | None, seeds: Tensor | None, eta: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if noise is not None and (seeds is not None or generator is not None):
            raise ValueError("noise: expected without generator and seeds, which draw it, got both")
        tables, row = self._table(step, sample, eta)
        learned = self.config.get("variance_type") == "learned_range"
        options = dict(
            prediction=self.config.prediction_type, learned_range=learned,
            clip=float(self.config.clip_sample_range) if self.config.clip_sample else None,
        )  # fmt: skip
        noisy = tables.std[row] > 0
        if noise is None or not noisy:
            if not noisy:
                seeds = None
            elif seeds is None:
                seeds = _draw_seeds(generator, sample)
            return functional.diffusion_step(sample, model_output, tables.drawn, row, seeds=seeds, **options)
        if not learned:
            return functional.diffusion_step(
                sample, model_output, tables.given, row, previous_x0=noise, **options
            )
        mean, x0 = functional.diffusion_step(sample, model_output, tables.drawn, row, **options)
        wide = tables.drawn.dtype
        low, high = tables.drawn[row, 6], tables.drawn[row, 7]
        fraction = (model_output[:, sample.shape[1] :].to(wide) + 1) / 2
        std = torch.exp(0.5 * (fraction * high + (1 - fraction) * low))
        return (mean + std * noise).to(sample.dtype), x0


def _draw_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, sample: Tensor) -> Tensor:
    """int64 [B], a new one a step and sample."""
    batch = len(sample)
    ends = dict(low=-(2**63), high=2**63 - 1)
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch:
            raise ValueError(f"generator: expected one a sample, {batch}, got {len(generator)}")
        return torch.cat([_draw_seeds(one, sample[:1]) for one in generator])
    drawn_on = sample.device if generator is None else generator.device
    seeds = torch.randint(size=(batch,), generator=generator, device=drawn_on, **ends)
    return seeds.to(sample.device, non_blocking=True)


def _coefficients(now: float, before: float) -> tuple[float, float, float, float, float]:
    """a, b of the posterior's mean a x + b x0, its variance, and the logs of variance and beta, from alpha^2
    at the step's time and at the one before (1: the data). Ho et al., 2006.11239, equations 6 and 7."""
    beta = 1 - now / before
    a = math.sqrt(1 - beta) * (1 - before) / (1 - now)
    b = math.sqrt(before) * beta / (1 - now)
    variance = max((1 - before) / (1 - now) * beta, 1e-20)  # their bound: the log of 0 is asked for
    return a, b, variance, math.log(variance), math.log(beta)


class _Ancestral(_FusedSteps):
    """Rows of the two schedulers that draw from the posterior."""

    def _row(self, timestep: int, previous: int, eta: float) -> tuple[float, ...]:
        now = self._alpha_squared(timestep)
        before = self._alpha_squared(previous) if previous >= 0 else 1.0
        a, b, variance, low, high = _coefficients(now, before)
        std = math.sqrt(math.exp(high)) if self.config.variance_type == "fixed_large" else math.sqrt(variance)
        if timestep == 0:
            std = 0.0
        return math.sqrt(now), math.sqrt(1 - now), a, b, 0.0, std, low, high


class FusedUnCLIP(_Ancestral):
    """diffusers' UnCLIPScheduler (Karlo, Kandinsky's prior) with a fused `step`: one kernel a step."""

    def step(
        self,
        model_output: Tensor,  # [B, C, *], [B, 2C, *] with variance_type="learned_range"
        timestep: int | Tensor,
        sample: Tensor,  # [B, C, *]
        prev_timestep: int | Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        noise: Tensor | None = None,  # [B, C, *]
        seeds: Tensor | None = None,  # int64 [B]
    ):
        """`prev_sample` and `pred_original_sample`. noise or seeds: instead of what generator draws."""
        time = self._int_of(timestep)
        previous = time - 1 if prev_timestep is None else self._int_of(prev_timestep)
        if previous >= time:
            raise ValueError(f"prev_timestep: expected less than timestep = {time}, got {previous}")
        values = self._fused_step(model_output, sample, (time, previous), generator, noise, seeds)
        if not return_dict:
            return values
        from diffusers.schedulers.scheduling_unclip import UnCLIPSchedulerOutput

        return UnCLIPSchedulerOutput(*values)


class FusedDDPM(_Ancestral):
    """diffusers' DDPMScheduler (Kandinsky's decoder) with a fused `step`.

    With thresholding, or the variance types "learned" and "fixed_large_log", the step is theirs.
    """

    def step(
        self,
        model_output: Tensor,  # [B, C, *], [B, 2C, *] with variance_type="learned_range"
        timestep: int | Tensor,
        sample: Tensor,  # [B, C, *]
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        noise: Tensor | None = None,  # [B, C, *]
        seeds: Tensor | None = None,  # int64 [B]
    ):
        """`prev_sample` and `pred_original_sample`. noise or seeds: instead of what generator draws."""
        if self.config.thresholding or self.config.variance_type in ("learned", "fixed_large_log"):
            _need_no_noise(noise, seeds, f"thresholding or variance_type={self.config.variance_type!r}")
            return super().step(model_output, timestep, sample, generator, return_dict)
        time = self._int_of(timestep)
        in_chain = self.custom_timesteps or self.num_inference_steps
        previous = self._next_in_chain(time) if in_chain else time - 1
        values = self._fused_step(model_output, sample, (time, previous), generator, noise, seeds)
        if not return_dict:
            return values
        from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

        return DDPMSchedulerOutput(*values)


class FusedDDIM(_FusedSteps):
    """diffusers' DDIMScheduler with a fused `step`.

    The step is theirs where x0 is bounded but the direction to x_t is not taken from the bounded x0: with
    thresholding, or with clip_sample and without use_clipped_model_output.
    """

    def step(
        self,
        model_output: Tensor,  # [B, C, *]
        timestep: int | Tensor,
        sample: Tensor,  # [B, C, *]
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,  # [B, C, *]
        return_dict: bool = True,
        *,
        seeds: Tensor | None = None,  # int64 [B]
    ):
        """`prev_sample`, `pred_original_sample`. variance_noise, seeds: instead of what generator draws."""
        if self.config.thresholding or (self.config.clip_sample and not use_clipped_model_output):
            _need_no_noise(None, seeds, "a bounded x0")
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise,
                return_dict,
            )  # fmt: skip
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps: expected set_timesteps before step, got None")
        time = self._int_of(timestep)
        step = (time, self._before(time))
        values = self._fused_step(model_output, sample, step, generator, variance_noise, seeds, float(eta))
        if not return_dict:
            return values
        from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

        return DDIMSchedulerOutput(*values)

    def _before(self, time: int) -> int:
        return time - self.config.num_train_timesteps // self.num_inference_steps

    def _chain(self, host: list[int]) -> list[tuple[int, int]]:
        return [(time, self._before(time)) for time in host]

    def _row(self, timestep: int, previous: int, eta: float) -> tuple[float, ...]:
        """Song et al., 2010.02502, equations 12 and 16."""
        now = self._alpha_squared(timestep)
        if previous < 0 and self.config.set_alpha_to_one:
            before = 1.0
        else:
            before = self._alpha_squared(max(previous, 0))
        std = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
        a = math.sqrt(max(1 - before - std**2, 0.0)) / math.sqrt(1 - now)
        b = math.sqrt(before) - a * math.sqrt(now)
        return math.sqrt(now), math.sqrt(1 - now), a, b, 0.0, std, 0.0, 0.0


def _need_no_noise(noise: Tensor | None, seeds: Tensor | None, why: str) -> None:
    if noise is not None or seeds is not None:
        raise ValueError(f"noise, seeds: expected None because of {why}, for which diffusers' own step runs")
