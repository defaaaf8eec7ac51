"""How close an upsampler comes to the same scene rendered large, beside bicubic interpolation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.data.synthetic.rendering import render
from dalle2_fast.data.synthetic.scenes import Scenes
from dalle2_fast.evaluation.psnr import psnr


def score_upsampler(
    upsample: Callable[[Tensor, int], Tensor],  # [b, 3, low, low], index of the first -> [b, 3, high, high]
    scenes: Scenes,
    *,
    low: int,
    high: int,
    batch_size: int = 4,
) -> dict[str, float | int]:
    """Mean PSNR in dB over pictures of `scenes`: of the upsampler, and of bicubic interpolation."""
    scores: dict[str, list[Tensor]] = {"psnr": [], "psnr_bicubic": []}
    for start in range(0, len(scenes["kind"]), batch_size):
        part = {key: value[start : start + batch_size] for key, value in scenes.items()}
        small, truth = render(part, low), render(part, high)
        scores["psnr"].append(psnr(upsample(small, start).cpu(), truth))
        # torch's coefficients (a = -0.75) come 0.15 dB closer to these renders than Pillow's (a = -0.5).
        bicubic = F.interpolate(small, truth.shape[-2:], mode="bicubic").clamp(0, 1)
        scores["psnr_bicubic"].append(psnr(bicubic, truth))
    return {name: round(torch.cat(parts).mean().item(), 2) for name, parts in scores.items()} | {
        "pictures": len(scenes["kind"])
    }
