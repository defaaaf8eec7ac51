"""The diffusion options that the constructors of the decoder and of the upsampler have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.schedules import make_schedule

_OPTIONS = (
    "prediction", "variance", "weighting", "min_snr_gamma", "log_snr_focus", "max_weight", "stratified",
    "sigma_data",
)  # fmt: skip


def diffusion_of(config: Mapping[str, Any]) -> GaussianDiffusion:
    """Build the diffusion process that the config of a model describes.

    Args:
        config: has these keys; the options other than schedule and timesteps are arguments of
            `GaussianDiffusion`, which documents them.

            schedule: the name of a noise schedule, or a dict of arguments of `make_schedule`.
            timesteps: the number of discrete times of a schedule that is given by name.
            prediction: what the network predicts.
            variance: variance of the noise of DDPM.
            weighting: weighting of the loss over time.
            min_snr_gamma: gamma of the weighting "min_snr".
            log_snr_focus: range of log-SNR from which a fraction of the training times is drawn, or None.
            vlb_weight: weight of the variational bound; None is the default of `GaussianDiffusion`.
            max_weight: upper bound on the weights.
            stratified: whether training times are stratified.
            sigma_data: standard deviation of the data, for the prediction "edm".

    Raises:
        TypeError, ValueError: an option has the wrong type or value.

    Example:
        >>> options = dict(schedule="cosine", timesteps=10, prediction="sample", variance="fixed_small",
        ...                weighting="uniform", min_snr_gamma=5.0, log_snr_focus=None, vlb_weight=None,
        ...                max_weight=100.0, stratified=False, sigma_data=0.5)
        >>> diffusion_of(options).schedule
        make_schedule(name='cosine', timesteps=10)
    """
    schedule = config["schedule"]
    options = {name: config[name] for name in _OPTIONS}
    if config["vlb_weight"] is not None:
        options["vlb_weight"] = config["vlb_weight"]
    if isinstance(schedule, dict):
        return GaussianDiffusion(make_schedule(**schedule), **options)
    return GaussianDiffusion(make_schedule(schedule, config["timesteps"]), **options)
