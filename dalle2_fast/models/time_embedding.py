"""The sinusoidal embedding of a time, which the U-Net, the upsampler and the network of the prior share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal_embedding(time: Tensor, width: int) -> Tensor:
    """[cos(time f), sin(time f)] with frequencies f that fall geometrically from 1 to 1/10000.

    Args:
        time: times [B], 0 .. 1000.
        width: the width of the embedding, even.

    Returns:
        float32 [B, width]; the cosines come first, as in ADM.

    Source: Vaswani et al., 1706.03762, section 3.5; Dhariwal and Nichol, 2105.05233, for the order.

    Example:
        >>> sinusoidal_embedding(torch.tensor([0.0]), 4)
        tensor([[1., 1., 0., 0.]])
    """
    half = width // 2
    exponent = torch.arange(half, device=time.device, dtype=torch.float32) / half
    angle = time.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1)
