"""The Gaussian diffusion process: training losses, the variational bound, sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion import inversion, sampling, training, vlb
from dalle2_fast.diffusion.names import PREDICTIONS, VARIANCES, WEIGHTINGS
from dalle2_fast.diffusion.sampler_tables import step_times
from dalle2_fast.diffusion.schedules import Schedule
from dalle2_fast.ops._broadcast import per_sample
from dalle2_fast.ops._dtypes import compute_dtype


class GaussianDiffusion:
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
            ("variance", variance, VARIANCES),
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
        alpha, sigma = self.alpha_sigma(t, x0)
        return functional.add_noise(x0, alpha, sigma, noise, seeds=seeds, step=sampling.INITIAL_NOISE)[0]

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x0 from what the network returned at x_t (without variance channels), unbounded."""
        if self.prediction == "sample":
            return output
        alpha, sigma = (per_sample(value, x_t) for value in self.alpha_sigma(t, x_t))
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

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t) on the device of `like`, float32 (float64 for such `like`)."""
        dtype = compute_dtype(like.dtype)
        t = t.to(like.device)
        return self.schedule.alpha(t).to(dtype), self.schedule.sigma(t).to(dtype)

    def split_output(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output at x as its prediction and, with a learned range, the variance logit."""
        channels = x.shape[1] * (2 if self.variance == "learned_range" else 1)
        expected = (x.shape[0], channels, *x.shape[2:])
        if tuple(output.shape) != expected:
            letters = "[B, 2C, ...]" if self.variance == "learned_range" else "[B, C, ...]"
            raise ValueError(f"net: expected an output {letters} = {expected}, got {tuple(output.shape)}")
        if self.variance == "learned_range":
            return output[:, : x.shape[1]], output[:, x.shape[1] :]
        return output, None

    def times(self, steps: int, spacing: str = "time") -> Tensor:
        """The falling times at which `sample` calls the network, [steps]."""
        return step_times(self.schedule, steps, spacing)

    # -- what is done with it: free functions of a process, which are its methods as well --------------------

    sample_times = training.sample_times
    training_loss = training.training_loss
    vlb_bits_per_dim = vlb.vlb_bits_per_dim
    sample = sampling.sample
    invert = inversion.invert
