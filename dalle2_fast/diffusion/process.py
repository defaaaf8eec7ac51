"""The Gaussian diffusion process: training losses, the variational bound, sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion import sampler_tables, vlb
from dalle2_fast.diffusion.sampling import INITIAL_NOISE, Net, Sampling, check_data, per_sample, wide_dtype
from dalle2_fast.diffusion.schedules import Schedule
from dalle2_fast.diffusion.weighting import PREDICTIONS, WEIGHTINGS, loss_weight


class GaussianDiffusion(Sampling):
    """What a network is trained on and sampled with, given a schedule.

    schedule: see `make_schedule`.
    prediction: what the network returns: "epsilon", "sample" (x0) or "v_prediction" (alpha epsilon - sigma
        x0).
    variance: of DDPM's noise: "fixed_small", "fixed_large", or "learned_range": then the network returns 2C
        channels whose second half places the log variance between the two (2102.09672, equation 15). Needs
        discrete times.
    weighting: of the loss over time, see `loss_weight`: "simple" is the error of epsilon, "x0" that of x0,
        "v" that of v, "min_snr" that of x0 times min(SNR, min_snr_gamma), each whatever the network
        predicts; "uniform" is the plain error of what it predicts.
    max_weight: bounds the weight on the network's own error. The weights "v" and "simple" on a network that
        predicts x0 grow without limit as the noise vanishes.
    log_snr_focus: (low, high, fraction): this fraction of the training times is drawn so that log-SNR is
        uniform on [low, high], beside the uniform ones.
    stratified: draw one training time from each B-th of their distribution, which lowers the gradient's
        variance.
    vlb_weight: of the bound in the hybrid loss of learned_range, L_simple + vlb_weight * timesteps * L_t with
        L_t in bits per dimension, as improved DDPM trains it.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: str = "epsilon",
        variance: str = "fixed_small",
        weighting: str = "simple",
        min_snr_gamma: float = 5.0,
        log_snr_focus: Sequence[float] | None = None,
        vlb_weight: float = 0.001,
        *,
        max_weight: float = 100.0,
        stratified: bool = False,
    ):
        if not isinstance(schedule, Schedule):
            came = type(schedule).__name__
            raise TypeError(f"schedule: expected a Schedule (see make_schedule), got {came}")
        for name, value, choices in (
            ("prediction", prediction, PREDICTIONS),
            ("variance", variance, sampler_tables.VARIANCES),
            ("weighting", weighting, WEIGHTINGS),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
        if variance == "learned_range" and (schedule.timesteps is None or schedule.timesteps < 2):
            raise ValueError(
                f"variance: 'learned_range' needs a discrete schedule of at least 2 timesteps, got {schedule}"
            )
        for name, value in (("min_snr_gamma", min_snr_gamma), ("max_weight", max_weight)):
            if not value > 0:
                raise ValueError(f"{name}: expected a number > 0, got {value}")
        if not (math.isfinite(vlb_weight) and vlb_weight >= 0):
            raise ValueError(f"vlb_weight: expected a finite number >= 0, got {vlb_weight}")
        if log_snr_focus is not None:
            log_snr_focus = focus = tuple(float(value) for value in log_snr_focus)
            if len(focus) != 3 or not focus[0] < focus[1] or not 0 <= focus[2] <= 1:
                raise ValueError(
                    f"log_snr_focus: expected (low, high, fraction) with low < high and fraction in [0, 1], "
                    f"got {focus}"
                )
        self.schedule, self.prediction = schedule, prediction
        self.variance, self.weighting = variance, weighting
        self.min_snr_gamma, self.max_weight, self.vlb_weight = min_snr_gamma, max_weight, vlb_weight
        self.log_snr_focus, self.stratified = log_snr_focus, stratified

    def to_config(self) -> dict[str, object]:
        """JSON-able; `from_config` rebuilds the process."""
        return {
            "schedule": self.schedule.to_config(), "prediction": self.prediction, "variance": self.variance,
            "weighting": self.weighting, "min_snr_gamma": self.min_snr_gamma,
            "log_snr_focus": None if self.log_snr_focus is None else list(self.log_snr_focus),
            "vlb_weight": self.vlb_weight, "max_weight": self.max_weight, "stratified": self.stratified,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, object]) -> GaussianDiffusion:
        options = {key: value for key, value in config.items() if key != "schedule"}
        return cls(Schedule.from_config(config["schedule"]), **options)

    # -- the process -----------------------------------------------------------------------------------------

    def add_noise(
        self, x0: Tensor, t: Tensor, noise: Tensor | None = None, *, seeds: Tensor | None = None
    ) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise, t [B]; by seeds, the noise that `sample` starts from."""
        alpha, sigma = self._alpha_sigma(t, x0)
        return functional.add_noise(x0, alpha, sigma, noise, seeds=seeds, step=INITIAL_NOISE)[0]

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x0 from what the network returned at x_t (without variance channels), unbounded."""
        if self.prediction == "sample":
            return output
        alpha, sigma = (per_sample(value, x_t) for value in self._alpha_sigma(t, x_t))
        if self.prediction == "epsilon":
            return (x_t - sigma * output) / alpha
        return alpha * x_t - sigma * output

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x0) of a discrete schedule, t int64 [B]: mean [B, *], variance and log variance
        [B, 1, ...].

        At t = 0 the mean is x0, the variance 0, and the log variance that of t = 1 (its own is minus
        infinity). Ho et al., 2006.11239, equations 6 and 7.
        """
        a, b, log_var_min, _ = vlb.single_step(self.schedule, t, x0)
        first = per_sample(t.to(x0.device) == 0, x0)
        return a * x_t + b * x0, log_var_min.exp().masked_fill(first, 0.0), log_var_min

    def _alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(like.dtype)
        t = t.to(like.device)
        return self.schedule.alpha(t).to(wide), self.schedule.sigma(t).to(wide)

    # -- training --------------------------------------------------------------------------------------------

    def sample_times(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Training times [batch]: int64 indices, or float64 in [0, 1) for a continuous schedule."""
        # A generator draws on its own device, which need not be the data's.
        drawn_on = generator.device if generator is not None else device
        u = torch.rand(batch, generator=generator, device=drawn_on, dtype=torch.float64)
        u = u.to(device if device is not None else u.device)
        if self.stratified:
            u = (torch.arange(batch, device=u.device) + u) / max(batch, 1)
        if self.log_snr_focus is None:
            return self.schedule.uniform_time(u)
        # One uniform number for both choices (inverse of the mixture's distribution), so that stratifying it
        # stratifies the mixture.
        low, high, fraction = self.log_snr_focus
        focused = self.schedule.time_at(low + (high - low) * u / max(fraction, 1e-12))
        uniform = self.schedule.uniform_time(((u - fraction) / max(1 - fraction, 1e-12)).clamp(0, 1))
        return torch.where(u < fraction, focused, uniform)

    def training_loss(
        self,
        net: Net,
        x0: Tensor,  # [B, C, *]
        *,
        t: Tensor | None = None,  # [B]
        noise: Tensor | None = None,  # [B, C, *]
        generator: torch.Generator | None = None,
        pixel_weight: Tensor | None = None,  # broadcasts to x0
    ) -> Tensor:  # [B]
        """The loss of each sample, float32 (float64 for such x0).

        Args:
            net: called once, net(x_t, time) with time float32 [B] (0 .. 1000) -> [B, C, *], or [B, 2C, *]
                with a learned range.
            x0: clean data; images in [-1, 1].
            t: times, drawn by `sample_times` when None.
            noise: drawn by `generator` when None.
            pixel_weight: factor on the squared error of each element, before the mean over elements.

        With a learned range the bound is added, in which the mean is detached: it teaches the variance only
        (Nichol and Dhariwal, 2102.09672, equation 16).
        """
        check_data(x0)
        batch = x0.shape[0]
        if t is None:
            t = self.sample_times(batch, generator, x0.device)
        elif tuple(t.shape) != (batch,):
            raise ValueError(f"t: expected [B] = ({batch},), got {tuple(t.shape)}")
        else:
            t = t.to(x0.device)
        if noise is None:
            drawn_on = generator.device if generator is not None else x0.device
            noise = torch.randn(x0.shape, generator=generator, device=drawn_on, dtype=x0.dtype).to(x0.device)
        alpha, sigma = self._alpha_sigma(t, x0)
        x_t, noise = functional.add_noise(x0, alpha, sigma, noise)
        output, range_position = self._split(net(x_t, self.schedule.net_time(t)), x_t)

        wide = wide_dtype(x0.dtype)
        if self.prediction == "epsilon":
            target = noise.to(wide)
        elif self.prediction == "sample":
            target = x0.to(wide)
        else:
            target = per_sample(alpha, x0) * noise - per_sample(sigma, x0) * x0
        squared = (output.to(wide) - target) ** 2
        if pixel_weight is not None:
            squared = squared * pixel_weight
        weight = loss_weight(
            self.schedule.log_snr(t), self.prediction, self.weighting, self.min_snr_gamma, self.max_weight
        )
        loss = weight.to(wide) * squared.flatten(1).mean(1)
        if range_position is not None and self.vlb_weight > 0:
            term = self._step_term(x0, x_t, t, output.detach(), range_position, clip=None, levels=256)
            loss = loss + self.vlb_weight * self.schedule.timesteps * term
        return loss

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output as its prediction and, with a learned range, the place in that range."""
        channels = x.shape[1] * (2 if self.variance == "learned_range" else 1)
        expected = (x.shape[0], channels, *x.shape[2:])
        if tuple(output.shape) != expected:
            letters = "[B, 2C, ...]" if self.variance == "learned_range" else "[B, C, ...]"
            raise ValueError(f"net: expected an output {letters} = {expected}, got {tuple(output.shape)}")
        if self.variance == "learned_range":
            return output[:, : x.shape[1]], output[:, x.shape[1] :]
        return output, None

    def _step_term(
        self, x0: Tensor, x_t: Tensor, t: Tensor, output: Tensor, range_position: Tensor | None,
        clip: float | None, levels: int | None,
    ) -> Tensor:  # fmt: skip
        x0, x_t, output = (value.to(wide_dtype(x0.dtype)) for value in (x0, x_t, output))
        predicted_x0 = self.predict_x0(x_t, t, output)
        if clip is not None:
            predicted_x0 = predicted_x0.clamp(-clip, clip)
        return vlb.step_term(self.schedule, self.variance, x0, x_t, t, predicted_x0, range_position, levels)

    @torch.no_grad()
    def vlb_bits_per_dim(
        self,
        net: Net,
        x0: Tensor,  # [B, C, *]
        *,
        seeds: Tensor,  # int64 [B]
        clip: float | None = 1.0,
        levels: int | None = 256,
    ) -> dict[str, Tensor]:
        """The variational bound on -log2 p(x0) per dimension, whatever the network predicts: timesteps calls
        of net.

        clip bounds the predicted x0. levels: the data are this many values in [-1, 1] (256 for 8-bit images),
        or None for a density. Returns total [B] = prior [B] + sum of terms [B, timesteps] (column t is L_t).
        Ho et al., 2006.11239, equation 5.
        """
        check_data(x0)
        if self.schedule.timesteps is None:
            raise ValueError(f"schedule: the bound needs one with discrete times, got {self.schedule}")
        terms = []
        for step in range(self.schedule.timesteps):
            t = torch.full((x0.shape[0],), step, device=x0.device)
            alpha, sigma = self._alpha_sigma(t, x0)
            x_t, _ = functional.add_noise(x0, alpha, sigma, seeds=seeds, step=step)
            output, range_position = self._split(net(x_t, self.schedule.net_time(t)), x_t)
            terms.append(self._step_term(x0, x_t, t, output, range_position, clip, levels))
        prior = vlb.prior_term(self.schedule, x0.to(wide_dtype(x0.dtype)))
        terms = torch.stack(terms, dim=1)
        return {"total": prior + terms.sum(1), "prior": prior, "terms": terms}
