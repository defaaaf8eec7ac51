"""diffusers' UnCLIP, DDPM and DDIM schedulers with `step` as one fused op.

Everything except `step` is diffusers' code (config, set_timesteps, add_noise, from_config), but
UnCLIPScheduler also makes a schedule of one step, for which diffusers' divides by zero.

By default a seed per sample is taken from the generator (or the list of generators, one per sample) that
`step` gets, and the op samples the noise from the seed. The same generator gives the same image every time,
but not the image that diffusers' scheduler makes from it. With `noise=` a step gives the numbers of
diffusers' up to 7e-4, because diffusers keeps its tables in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dalle2_fast.adapters.diffusers.fused_steps import FusedSteps, check_no_noise


def posterior(now: float, before: float) -> tuple[float, float, float, float, float]:
    """a, b, variance, log variance and log beta of the posterior N(a x_t + b x0, variance).

    Source: Ho et al., 2006.11239, equations 6 and 7.

    Args:
        now: alpha^2 at the timestep of the step.
        before: alpha^2 at the timestep before it; 1 for the data.
    """
    beta = 1 - now / before
    a = math.sqrt(1 - beta) * (1 - before) / (1 - now)
    b = math.sqrt(before) * beta / (1 - now)
    variance = max((1 - before) / (1 - now) * beta, 1e-20)  # diffusers' lower bound; its log is needed
    return a, b, variance, math.log(variance), math.log(beta)


class _Ancestral(FusedSteps):
    """The coefficients of the two schedulers that sample from the posterior."""

    def _row(self, timestep: int, previous: int, eta: float) -> tuple[float, ...]:
        now = self._alpha_squared(timestep)
        before = self._alpha_squared(previous) if previous >= 0 else 1.0
        a, b, variance, log_min, log_max = posterior(now, before)
        fixed_large = self.config.variance_type == "fixed_large"
        std = math.sqrt(math.exp(log_max)) if fixed_large else math.sqrt(variance)
        if timestep == 0:
            std = 0.0
        return math.sqrt(now), math.sqrt(1 - now), a, b, 0.0, std, log_min, log_max


class FusedUnCLIP(_Ancestral):
    """diffusers' UnCLIPScheduler (Karlo, Kandinsky's prior) with a fused `step`: one kernel per step.

    Example:
        >>> from dalle2_fast.adapters.diffusers import UnCLIPScheduler
        >>> scheduler = UnCLIPScheduler(variance_type="fixed_small_log")
        >>> scheduler.set_timesteps(2)
        >>> x, t = torch.zeros(1, 3, 4, 4), scheduler.timesteps
        >>> scheduler.step(x, t[0], x, t[1]).prev_sample.shape
        torch.Size([1, 3, 4, 4])
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a sampling run, as diffusers does; one step is the noisiest timestep.

        Args:
            num_inference_steps: how many, at least 1.
            device: of `timesteps`.

        Raises:
            ValueError: fewer than one step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: expected at least 1, got {num_inference_steps}")
        if num_inference_steps == 1:  # diffusers divides by the number of intervals, which is 0
            self.num_inference_steps = 1
            self.timesteps = torch.tensor([self.config.num_train_timesteps - 1], device=device)
        else:
            super().set_timesteps(num_inference_steps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        prev_timestep: int | Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
    ):
        """One step towards the data.

        Args:
            model_output: [B, C, *]; [B, 2 C, *] with variance_type="learned_range".
            timestep: an entry of `timesteps`; a view of that tensor costs no synchronisation.
            sample: x_t, [B, C, *].
            prev_timestep: the timestep after it in `timesteps`; None is timestep - 1.
            generator: one, or a list with one per sample; seeds are taken from it.
            return_dict: whether a tuple (False) or diffusers' output class is returned.
            noise: standard normal [B, C, *], used instead of sampled noise.
            seeds: int64 [B], used instead of seeds from the generator.

        Returns:
            `prev_sample` and `pred_original_sample`, each [B, C, *].

        Raises:
            ValueError: prev_timestep is not less than timestep; noise is passed with a generator or seeds; or
                a shape does not fit.
        """
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

    With thresholding, or the variance types "learned" and "fixed_large_log", diffusers' step runs.

    Example:
        >>> from dalle2_fast.adapters.diffusers import DDPMScheduler
        >>> scheduler = DDPMScheduler()
        >>> scheduler.set_timesteps(2)
        >>> x = torch.zeros(1, 3, 4, 4)
        >>> scheduler.step(x, scheduler.timesteps[0], x).prev_sample.shape
        torch.Size([1, 3, 4, 4])
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
    ):
        """One step towards the data.

        Args, Returns: as for UnCLIPScheduler's `step`, without prev_timestep.

        Raises:
            ValueError: timestep is not in `timesteps`; noise is passed with a generator or seeds, or where
                diffusers' step runs; or a shape does not fit.
        """
        if self.config.thresholding or self.config.variance_type in ("learned", "fixed_large_log"):
            check_no_noise(noise, seeds, f"thresholding or variance_type={self.config.variance_type!r}")
            return super().step(model_output, timestep, sample, generator, return_dict)
        time = self._int_of(timestep)
        strided = self.custom_timesteps or self.num_inference_steps
        previous = self._next_timestep(time) if strided else time - 1
        values = self._fused_step(model_output, sample, (time, previous), generator, noise, seeds)
        if not return_dict:
            return values
        from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

        return DDPMSchedulerOutput(*values)


class FusedDDIM(FusedSteps):
    """diffusers' DDIMScheduler with a fused `step`.

    diffusers' step runs if x0 is bounded but the direction to x_t does not follow from the bounded x0: with
    thresholding, or with clip_sample and without use_clipped_model_output.

    Example:
        >>> from dalle2_fast.adapters.diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler(clip_sample=False)
        >>> scheduler.set_timesteps(2)
        >>> x = torch.zeros(1, 3, 4, 4)
        >>> scheduler.step(x, scheduler.timesteps[0], x).prev_sample.shape
        torch.Size([1, 3, 4, 4])
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seeds: Tensor | None = None,
    ):
        """One step towards the data.

        Args:
            model_output: [B, C, *].
            timestep: an entry of `timesteps`; a view of that tensor costs no synchronisation.
            sample: x_t, [B, C, *].
            eta: factor on the standard deviation of the noise, 0 (deterministic) to 1 (as DDPM).
            use_clipped_model_output: whether the direction to x_t follows from the bounded x0.
            generator: one, or a list with one per sample; seeds are taken from it.
            variance_noise: standard normal [B, C, *], used instead of sampled noise.
            return_dict: whether a tuple (False) or diffusers' output class is returned.
            seeds: int64 [B], used instead of seeds from the generator.

        Returns:
            `prev_sample` and `pred_original_sample`, each [B, C, *].

        Raises:
            ValueError: set_timesteps was not called; noise is passed with a generator or seeds; seeds are
                passed where diffusers' step runs; or a shape does not fit.
        """
        if self.config.thresholding or (self.config.clip_sample and not use_clipped_model_output):
            check_no_noise(None, seeds, "a bounded x0")
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

    def _steps(self, host: list[int]) -> list[tuple[int, int]]:
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
