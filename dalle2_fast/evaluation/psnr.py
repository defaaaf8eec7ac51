"""Peak signal-to-noise ratio."""

from __future__ import annotations

import math

from torch import Tensor


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """[n] in dB: 10 log10(1 / mean squared error), for each image.

    Args:
        images: [n, 3, H, W] in [0, 1], any floating-point dtype; the error is computed in float32.
        truth: of the same shape.

    Example:
        >>> import torch
        >>> truth = torch.zeros(2, 3, 4, 4)
        >>> [round(value, 2) for value in psnr(truth + 0.1, truth).tolist()]
        [20.0, 20.0]
    """
    error = (images.float() - truth.float()).square().flatten(1).mean(1).clamp_min(1e-12)
    return error.log() * (-10.0 / math.log(10.0))
