"""The recipe of a distillation: how it is optimised, and what defines it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dalle2_fast.models.distilled import weight_range
from dalle2_fast.pipeline.dalle2 import DALLE2
from dalle2_fast.training.distillation.student import (
    GUIDED,
    SETTINGS,
    check_teacher,
    fingerprint,
)
from dalle2_fast.training.recipes import STAGES, Optimisation, Preset, Recipe

# Constant learning rate with an average of the weights, as ECT (2406.14548) trains; its rate of 1e-4.
OPTIMISATION = Optimisation(
    batch_size=64, steps=10_000, learning_rate=1e-4, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=100,
    hold=0.8, decay="linear", ema_decay=0.999,
)  # fmt: skip
# Without a memory of the gradient, as 2405.14867 (appendix) trains both networks. Its rates, up to 2e-6, are
# of networks that have 30 to 300 times as many weights as the scenes'.
MATCHING = replace(OPTIMISATION, learning_rate=2e-5, betas=(0.0, 0.999))


def distillation_preset(
    pipe: DALLE2,
    stage: str,
    teacher: Path,
    steps: int,
    guidance: tuple[float, float] | None,
    method: str = "consistency",
) -> Preset:
    """The preset with which the trainer distils a stage.

    Args:
        pipe: the teacher.
        stage: "decoder", "prior" or "upsampler".
        teacher: the folder of `pipe`.
        steps: the largest number of steps of the student.
        guidance: smallest and largest weight; None is 1 to the teacher's plus 2.
        method: "consistency" or "dmd2".

    Raises:
        ValueError: the teacher has no such network, or the upsampler would get a range of guidance.
    """
    network = check_teacher(pipe, stage)
    data: dict = {"teacher": os.path.abspath(teacher), "weights": fingerprint(network), "steps": steps}
    if stage in GUIDED:
        prefix = SETTINGS[stage]
        default = (1.0, max(1.0, float(pipe.sampling[f"{prefix}guidance"])) + 2)
        interval = pipe.sampling[f"{prefix}guidance_interval"]
        data["guidance"] = weight_range("--guidance", default if guidance is None else guidance)
        data["interval"] = None if interval is None else list(interval)
    elif guidance is not None:
        raise ValueError(f"--guidance: expected none, because an {stage} has no guidance, got {guidance}")
    if method != "consistency":  # which older runs do not name
        data["method"] = method
    optimisation = MATCHING if method == "dmd2" else OPTIMISATION
    recipe = Recipe(model={}, optimisation=optimisation, data=data)
    world = pipe.metadata.get("world") or {}
    return Preset(name="distillation", world=world, **dict.fromkeys(STAGES, recipe))
