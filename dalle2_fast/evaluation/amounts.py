"""What can be measured, and how much. Nothing here imports torch: `dalle2-fast evaluate --help` reads it."""

from __future__ import annotations

from typing import NamedTuple

SPLITS = ("iid", "comp")
PARTS = ("clip", "captions", "upsampler", "outlines", "denoising")
SETTINGS = (
    "steps", "guidance", "guidance_interval", "candidates", "prior_steps", "prior_guidance",
    "prior_guidance_interval", "upsampler_steps", "sampler",
)  # fmt: skip


class Amounts(NamedTuple):
    """How much is measured."""

    captions: int  # for which images are generated, per split
    clip_captions: int  # among which CLIP chooses
    training_captions: int  # of which the nearest-image baseline takes one
    pictures: int  # that are upsampled, and that are denoised
    outlines: int  # large objects of each shape whose outline is compared with the ideal one


FULL, QUICK = Amounts(500, 1000, 20_000, 32, 20), Amounts(32, 200, 2_000, 8, 2)
