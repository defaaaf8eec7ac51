"""The Gaussian diffusion process: noise is added to x0, and a network learns to remove it.

    x_t = alpha(t) x0 + sigma(t) noise

This file holds the process and its configuration. What is done with a process (training, likelihood,
sampling, inversion) has a file each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion import inversion, sampling, training, vlb
from dalle2_fast.diffusion.names import PREDICTIONS, VARIANCES, WEIGHTINGS
from dalle2_fast.diffusion.preconditioning import Preconditioning, precondition
from dalle2_fast.diffusion.sampler_tables import step_times
from dalle2_fast.diffusion.schedules import Schedule
from dalle2_fast.ops._dtypes import compute_dtype, per_sample


class GaussianDiffusion:
    """A diffusion process: how a network is trained, and how samples are drawn with it.

    Args:
        schedule: the noise schedule, see `make_schedule`.
        prediction: what the network predicts: "epsilon", "sample" (x0), "v_prediction" (v = alpha epsilon -
            sigma x0), or "edm", a correction of its input, see `precondition`.
        variance: variance of the noise of DDPM: "fixed_small", "fixed_large", or "learned_range". With
            "learned_range" the network returns 2C channels, of which the second half interpolates the log
            variance between the two fixed ones (2102.09672, equation 15); it needs discrete times.
        weighting: weighting of the loss over time, see `loss_weight`. Regardless of the prediction, "simple"
            is the error of epsilon, "x0" that of x0, "v" that of v, and "min_snr" that of x0 times
            min(SNR, min_snr_gamma); "uniform" is the plain error of what the network predicts.
        min_snr_gamma: gamma of "min_snr", > 0.
        log_snr_focus: (low, high, fraction). This fraction of the training times is drawn so that log-SNR is
            uniform on [low, high]; the other times are uniform.
        vlb_weight: weight of the variational bound in the hybrid loss of "learned_range", L_simple +
            vlb_weight * timesteps * L_t with L_t in bits per dimension, as improved DDPM trains it; >= 0.
        max_weight: upper bound on the weight of the network's error, > 0. For a network that predicts x0 the
            weights "v" and "simple" grow without limit as the noise vanishes.
        stratified: draw one training time from each B-th of their distribution, which lowers the variance of
            the gradient.
        sigma_data: of "edm", the standard deviation of the data, > 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.

    Source: Ho et al., 2006.11239; Nichol and Dhariwal, 2102.09672.

    Example:
        >>> import torch
        >>> from dalle2_fast.diffusion import make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine"), prediction="v_prediction")
        >>> net = lambda x, time: torch.zeros_like(x)
        >>> diffusion.training_loss(net, torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2])
        >>> diffusion.sample(net, (2, 3, 8, 8), seeds=torch.tensor([0, 1]), steps=4).shape
        torch.Size([2, 3, 8, 8])
    """

    sigma_data: float = 0.5  # of the class, because pickles of version 0.1.0 do not have it

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
        sigma_data: float = 0.5,
    ):
        if not isinstance(schedule, Schedule):
            came = type(schedule).__name__
            raise TypeError(f"schedule: expected a Schedule (see make_schedule), got {came}")
        for name, value, choices in (
            ("prediction", prediction, PREDICTIONS),
            ("variance", variance, VARIANCES),
            ("weighting", weighting, WEIGHTINGS),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
        if variance == "learned_range" and (schedule.timesteps is None or schedule.timesteps < 2):
            raise ValueError(
                f"variance: 'learned_range' needs a discrete schedule of at least 2 timesteps, got {schedule}"
            )
        for name, value in (
            ("min_snr_gamma", min_snr_gamma), ("max_weight", max_weight), ("sigma_data", sigma_data)
        ):  # fmt: skip
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
        self.log_snr_focus, self.stratified, self.sigma_data = log_snr_focus, stratified, sigma_data

    def to_config(self) -> dict[str, object]:
        """The JSON-able description from which `from_config` rebuilds the process."""
        return {
            "schedule": self.schedule.to_config(), "prediction": self.prediction, "variance": self.variance,
            "weighting": self.weighting, "min_snr_gamma": self.min_snr_gamma,
            "log_snr_focus": None if self.log_snr_focus is None else list(self.log_snr_focus),
            "vlb_weight": self.vlb_weight, "max_weight": self.max_weight, "stratified": self.stratified,
            "sigma_data": self.sigma_data,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, object]) -> GaussianDiffusion:
        """Build the process that `to_config` described."""
        options = {key: value for key, value in config.items() if key != "schedule"}
        return cls(Schedule.from_config(config["schedule"]), **options)

    # -- the process -----------------------------------------------------------------------------------------

    def add_noise(
        self, x0: Tensor, t: Tensor, noise: Tensor | None = None, *, seeds: Tensor | None = None
    ) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise.

        Args:
            x0: clean data [B, *].
            t: times [B].
            noise: standard normal noise [B, *]; give it or `seeds`.
            seeds: int64 [B]; the noise is then the one from which `sample` starts with these seeds.

        Returns:
            x_t [B, *] in the dtype of x0.
        """
        alpha, sigma = self.alpha_sigma(t, x0)
        return functional.add_noise(x0, alpha, sigma, noise, seeds=seeds, step=sampling.INITIAL_NOISE)[0]

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The x0 that the network's prediction at x_t implies, without clipping.

        Args:
            x_t: noisy data [B, C, *].
            t: times [B].
            output: the prediction [B, C, *], without the channels of a learned variance.
        """
        if self.prediction == "sample":
            return output
        if self.prediction == "edm":
            _, skip, gain = self._preconditioning(t, x_t)
            return skip * x_t + gain * output
        alpha, sigma = (per_sample(value, x_t) for value in self.alpha_sigma(t, x_t))
        if self.prediction == "epsilon":
            return (x_t - sigma * output) / alpha
        return alpha * x_t - sigma * output

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The posterior q(x_{t-1} | x_t, x0) of a process with discrete times.

        Args:
            x0: clean data [B, *].
            x_t: noisy data [B, *].
            t: times, int64 [B].

        Returns:
            Mean [B, *], variance and log variance [B, 1, ...]. At t = 0 the mean is x0, the variance is 0,
            and the log variance is that of t = 1, because the log of 0 is minus infinity.

        Raises:
            ValueError: the schedule has continuous times.

        Source: Ho et al., 2006.11239, equations 6 and 7.
        """
        a, b, log_var_min, _ = vlb.single_step(self.schedule, t, x0)
        first = per_sample(t.to(x0.device) == 0, x0)
        return a * x_t + b * x0, log_var_min.exp().masked_fill(first, 0.0), log_var_min

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t) [B] on the device of `like`, in float32 (float64 for a float64 `like`)."""
        dtype, device = compute_dtype(like.dtype), like.device
        t = t.to("cpu" if device.type == "mps" else device)  # Apple's GPUs have no float64
        return tuple(f(t).to(dtype).to(device) for f in (self.schedule.alpha, self.schedule.sigma))

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network receives of x_t [B, C, *] at times t [B]: for "edm" it is scaled to variance 1."""
        return x_t if self.prediction != "edm" else x_t * self._preconditioning(t, x_t).scale.to(x_t.dtype)

    def preconditioned_target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a network of prediction "edm" learns to return, (sigma x0 - sigma_data^2 alpha noise) /
        (sigma_data n), of unit variance; x0 and noise [B, *], t [B]."""
        alpha, sigma = (per_sample(value, x0) for value in self.alpha_sigma(t, x0))
        scale = self._preconditioning(t, x0).scale
        return (sigma / self.sigma_data * x0 - self.sigma_data * alpha * noise) * scale

    def _preconditioning(self, t: Tensor, like: Tensor) -> Preconditioning:
        """The factors at the times t [B], as [B, 1, ...] for `like` [B, ...], on its device."""
        dtype, device = compute_dtype(like.dtype), like.device
        log_snr = self.schedule.log_snr(t.to("cpu" if device.type == "mps" else device))
        factors = precondition(log_snr, self.sigma_data)
        return Preconditioning(*(per_sample(value.to(dtype).to(device), like) for value in factors))

    def split_output(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the network's output at x into its prediction and, with a learned range, the variance logit.

        Raises:
            ValueError: the output does not have the shape of x, or with a learned range twice its channels.
        """
        channels = x.shape[1] * (2 if self.variance == "learned_range" else 1)
        expected = (x.shape[0], channels, *x.shape[2:])
        if tuple(output.shape) != expected:
            letters = "[B, 2C, ...]" if self.variance == "learned_range" else "[B, C, ...]"
            raise ValueError(f"net: expected an output {letters} = {expected}, got {tuple(output.shape)}")
        if self.variance == "learned_range":
            return output[:, : x.shape[1]], output[:, x.shape[1] :]
        return output, None

    def times(self, steps: int, spacing: str = "time") -> Tensor:
        """The falling times at which `sample` calls the network, [steps]; see `step_times`."""
        return step_times(self.schedule, steps, spacing)

    # -- what is done with a process: free functions, which are also its methods -----------------------------

    sample_times = training.sample_times
    training_loss = training.training_loss
    vlb_bits_per_dim = vlb.vlb_bits_per_dim
    sample = sampling.sample
    invert = inversion.invert
