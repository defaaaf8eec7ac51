"""The condition of an upsampler: a small image, degraded and noised, at the size of the large one.

Noise on the condition: Cascaded Diffusion Models, arXiv 2106.15282, section 4.1.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.functional import add_noise


def noised(low_res: Tensor, level: Tensor, noise: Tensor) -> Tensor:  # [B, C, h, w], [B], [B, C, h, w]
    """Variance-preserving: level 0 is clean, level 1 pure noise."""
    angle = level.float() * (math.pi / 2)
    return add_noise(low_res, angle.cos(), angle.sin(), noise)[0]


def enlarged(low_res: Tensor, factor: int, mode: str) -> Tensor:
    """[B, C, h, w] -> [B, C, factor h, factor w]."""
    # antialias changes nothing for "bilinear"; for "bicubic" it selects the usual coefficients, a = -0.5.
    return F.interpolate(low_res, scale_factor=factor, mode=mode, antialias=True)
