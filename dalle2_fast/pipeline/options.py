"""The keyword arguments of `DALLE2.generate` as a type, for `DALLE2.__call__`, which passes them on."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from dalle2_fast.pipeline.progress import Progress


class GenerateOptions(TypedDict, total=False):
    """Documented in `DALLE2.generate`; a type checker reports any other name."""

    seed: int | None
    generator: torch.Generator | None
    steps: int | None
    guidance: float | None
    candidates: int | None
    prior_steps: int | None
    prior_guidance: float | None
    negative_prompt: str | None
    init_image: Tensor | Image | None
    strength: float
    upsampler_steps: int | None
    upsampler2_steps: int | None
    size: int | None
    tile: int | None
    sampler: str | None
    batch_size: int | None
    progress: Progress
