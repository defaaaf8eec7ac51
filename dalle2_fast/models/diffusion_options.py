"""The diffusion process of a model, from the options that its constructor takes and its config holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.schedules import make_schedule

_OPTIONS = (
    "prediction", "variance", "weighting", "min_snr_gamma", "log_snr_focus", "max_weight", "stratified",
)  # fmt: skip


def diffusion_of(config: Mapping[str, Any]) -> GaussianDiffusion:
    """The process that the config of a decoder or an upsampler describes.

    schedule: a name, with timesteps, or the arguments of `make_schedule`. vlb_weight: None is the default of
    GaussianDiffusion. The others are its arguments: prediction, variance, weighting, min_snr_gamma,
    log_snr_focus, max_weight, stratified.
    """
    schedule = config["schedule"]
    options = {name: config[name] for name in _OPTIONS}
    if config["vlb_weight"] is not None:
        options["vlb_weight"] = config["vlb_weight"]
    if isinstance(schedule, dict):
        return GaussianDiffusion(make_schedule(**schedule), **options)
    return GaussianDiffusion(make_schedule(schedule, config["timesteps"]), **options)
