"""Times as vectors: the sinusoidal embedding that the U-Net, the upsampler and the prior's network share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal_embedding(time: Tensor, width: int) -> Tensor:
    """[cos(time f), sin(time f)], f falling geometrically from 1 to 1/10000; time [B] -> float32 [B, width].

    Source: Vaswani et al. 2017, cosines first as in ADM. width is even.
    """
    half = width // 2
    exponent = torch.arange(half, device=time.device, dtype=torch.float32) / half
    angle = time.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1)
