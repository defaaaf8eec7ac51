"""The condition of an upsampler: the small image, with noise, enlarged to the size of the large image.

Source: Ho et al., "Cascaded Diffusion Models", 2106.15282, section 4.1, for the noise.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.functional import add_noise


def noised(low_res: Tensor, level: Tensor, noise: Tensor) -> Tensor:  # [B, C, h, w], [B], [B, C, h, w]
    """Add noise of a level in [0, 1], variance-preserving: 0 is the clean image, 1 is pure noise.

    Example:
        >>> import torch
        >>> noised(torch.ones(1, 1, 1, 2), torch.tensor([0.0]), torch.zeros(1, 1, 1, 2))
        tensor([[[[1., 1.]]]])
    """
    angle = level.float() * (math.pi / 2)
    return add_noise(low_res, angle.cos(), angle.sin(), noise)[0]


def enlarged(low_res: Tensor, factor: int, mode: str) -> Tensor:
    """Enlarge images [B, C, h, w] -> [B, C, factor h, factor w] with the filter "bilinear" or "bicubic".

    Example:
        >>> import torch
        >>> enlarged(torch.zeros(1, 3, 2, 2), 4, "bilinear").shape
        torch.Size([1, 3, 8, 8])
    """
    # antialias changes nothing for "bilinear"; for "bicubic" it selects the usual coefficient a = -0.5.
    return F.interpolate(low_res, scale_factor=factor, mode=mode, antialias=True)
