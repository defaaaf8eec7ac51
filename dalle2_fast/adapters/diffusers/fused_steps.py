"""A scheduler's step as one fused op, driven by a table of coefficients on the device.

A step is one row of the table, so it launches one kernel and copies nothing to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.ops._dtypes import compute_dtype


class StepTables(NamedTuple):
    """Tables of `functional.diffusion_step` on one device: for noise that the op samples, and for noise that
    is passed to it, in the place of previous_x0 and with std as its coefficient."""

    rows: dict[tuple[int, int], int]  # (timestep, previous timestep) -> row
    std: list[float]
    sampled_noise: Tensor  # [rows, 8]
    given_noise: Tensor  # [rows, 8]


class FusedSteps:
    """The part that all three schedulers share. Each one defines `_row`, the coefficients of a step."""

    def _row(self, timestep: int, previous: int, eta: float) -> tuple[float, ...]:
        raise NotImplementedError

    # --------------------------------------------------------------- timesteps without waiting for the device

    def _host_timesteps(self) -> list[int]:
        """self.timesteps as integers, read from the device once."""
        times = self.timesteps
        known = self.__dict__.get("_known_timesteps")
        if known is None or known[0] is not times or known[1] != times._version:
            known = (times, times._version, [int(time) for time in times.tolist()])
            self._known_timesteps, self._tables = known, {}
        return known[2]

    def _int_of(self, timestep: int | Tensor) -> int:
        """A loop over self.timesteps passes views of it; the memory address of a view gives its index."""
        host, times = self._host_timesteps(), self.timesteps
        if isinstance(timestep, Tensor) and timestep.numel() == 1 and timestep.dtype == times.dtype:
            index, rest = divmod(timestep.data_ptr() - times.data_ptr(), times.element_size())
            same = timestep.untyped_storage().data_ptr() == times.untyped_storage().data_ptr()
            if same and rest == 0 and 0 <= index < len(host):
                return host[index]
        return int(timestep)

    def _next_timestep(self, timestep: int) -> int:
        """The timestep after this one in self.timesteps, -1 after the last."""
        host = self._host_timesteps()
        if timestep not in host:
            raise ValueError(f"timestep: expected one of scheduler.timesteps, got {timestep}")
        index = host.index(timestep)
        return host[index + 1] if index + 1 < len(host) else -1

    def _alpha_squared(self, time: int) -> float:
        """alphas_cumprod in float64: in float32, 1 - alphas_cumprod[0] has a relative error of 1e-3."""
        if "_alphas_squared" not in self.__dict__:
            self._alphas_squared = (1 - self.betas.double()).cumprod(0).tolist()
        return self._alphas_squared[time]

    # ---------------------------------------------------------------------------------------------- the table

    def _steps(self, host: list[int]) -> list[tuple[int, int]]:
        """(timestep, previous timestep) of the steps that a loop over self.timesteps will take."""
        return [*zip(host, [*host[1:], -1], strict=True)]

    def _table(self, step: tuple[int, int], like: Tensor, eta: float) -> tuple[StepTables, int]:
        """The tables for the device and dtype of `like`, and the row of a step in them."""
        dtype = compute_dtype(like.dtype)
        host = self._host_timesteps()
        key = (like.device, dtype, eta)
        tables = self._tables.get(key)
        if tables is None or step not in tables.rows:
            known = [] if tables is None else list(tables.rows)
            expected = self._steps(host) if self.num_inference_steps else []
            steps = list(dict.fromkeys([*known, *expected, step]))
            table = torch.tensor([self._row(*one, eta) for one in steps], dtype=torch.float64)
            given = table.clone()
            given[:, 4], given[:, 5] = table[:, 5], 0.0
            rows = {one: row for row, one in enumerate(steps)}
            on_device = (one.to(like.device, dtype) for one in (table, given))
            tables = self._tables[key] = StepTables(rows, table[:, 5].tolist(), *on_device)
        return tables, tables.rows[step]

    # ----------------------------------------------------------------------------------------------- the step

    def _fused_step(
        self, model_output: Tensor, sample: Tensor, step: tuple[int, int], generator: Any,
        noise: Tensor | None, seeds: Tensor | None, eta: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(previous sample, predicted x0), each of the shape of `sample`."""
        if noise is not None and (seeds is not None or generator is not None):
            raise ValueError("noise: expected without generator and seeds, which sample it, got both")
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
                seeds = _sample_seeds(generator, sample)
            table = tables.sampled_noise
            return functional.diffusion_step(sample, model_output, table, row, seeds=seeds, **options)
        if not learned:
            return functional.diffusion_step(
                sample, model_output, tables.given_noise, row, previous_x0=noise, **options
            )
        mean, x0 = functional.diffusion_step(sample, model_output, tables.sampled_noise, row, **options)
        log_min, log_max = tables.sampled_noise[row, 6], tables.sampled_noise[row, 7]
        fraction = (model_output[:, sample.shape[1] :].to(tables.sampled_noise.dtype) + 1) / 2
        std = torch.exp(0.5 * (fraction * log_max + (1 - fraction) * log_min))
        return (mean + std * noise).to(sample.dtype), x0


def _sample_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, sample: Tensor) -> Tensor:
    """int64 [B]: new seeds for every step and sample."""
    batch = len(sample)
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch:
            raise ValueError(f"generator: expected one per sample, {batch}, got {len(generator)}")
        return torch.cat([_sample_seeds(one, sample[:1]) for one in generator])
    device = sample.device if generator is None else generator.device
    limits = dict(low=-(2**63), high=2**63 - 1)
    seeds = torch.randint(size=(batch,), generator=generator, device=device, **limits)
    return seeds.to(sample.device, non_blocking=True)


def check_no_noise(noise: Tensor | None, seeds: Tensor | None, why: str) -> None:
    """Raise ValueError if noise is passed to a step that diffusers itself computes."""
    if noise is not None or seeds is not None:
        raise ValueError(f"noise, seeds: expected None because of {why}, for which diffusers' own step runs")
