"""JPEG's effect on an image, in tensors: colours, chroma at half size, 8 x 8 cosines, quantisation.

    coefficients <- round(coefficients / table) * table

JPEG's lossless coding changes no pixel and is omitted. Without it no file, no copy to the host and no loop
over images is needed.

Source: ITU-T T.81, with the tables of annex K.1 and K.2; JFIF 1.02 for the colours; libjpeg for the scaling
of the tables by quality.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.ops._dtypes import compute_dtype

_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))


def jpeg(
    images: Tensor,  # [B, C, H, W] in [0, 1], H, W >= 1
    quality: float | Tensor,  # 1..100, a number or [B]
    subsample: bool = True,
) -> Tensor:
    """The images after JPEG at this quality, on 8-bit levels. Rounding leaves no useful gradient.

    Args:
        images: three channels are RGB and become YCbCr; with any other number each channel is coded as
            luminance.
        quality: a number is checked; the values of a tensor are clamped without a check, because reading them
            would stall a GPU.
        subsample: whether chroma has half the size (4:2:0, as in most encoders).

    Returns:
        Images of the same shape and dtype.

    Raises:
        ValueError: quality is a number outside of [1, 100].

    Example:
        >>> jpeg(torch.rand(1, 3, 10, 12), quality=75).shape
        torch.Size([1, 3, 10, 12])
    """
    if not isinstance(quality, Tensor) and not 1 <= quality <= 100:
        raise ValueError(f"quality: expected a number in [1, 100], got {quality}")
    height, width = images.shape[-2:]
    dtype = compute_dtype(images.dtype)
    x = (images.to(dtype) * 255).round()
    multiple = 16 if subsample and images.shape[1] == 3 else 8
    x = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    quality = torch.as_tensor(quality, device=x.device, dtype=dtype).clamp(1, 100)
    quality = quality.expand(len(x))[:, None, None]
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    tables = torch.tensor((_LUMINANCE, _CHROMINANCE), device=x.device, dtype=dtype)
    luminance, chrominance = ((tables[:, None] * scale + 50) / 100).floor().clamp(1, 255)  # [B, 8, 8] each
    if images.shape[1] != 3:
        x = _through_cosines(x, luminance)
    else:
        matrix = torch.tensor(_TO_YCBCR, device=x.device, dtype=dtype)
        x = torch.einsum("ij,bjhw->bihw", matrix, x)
        bright, colour = x[:, :1].round(), (x[:, 1:] + 128).round()
        if subsample:
            # libjpeg rounds means of four up or down depending on the column, which avoids a bias.
            half = 0.25 + 0.25 * (torch.arange(x.shape[3] // 2, device=x.device) % 2)
            colour = (F.avg_pool2d(colour, 2) + half).floor()
        colour = _through_cosines(colour, chrominance)
        if subsample:
            colour = F.interpolate(colour, scale_factor=2, mode="bilinear").round()
        x = torch.cat([_through_cosines(bright, luminance), colour - 128], dim=1)
        x = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(matrix), x)
    return (x.round().clamp(0, 255) / 255)[..., :height, :width].to(images.dtype)


def _through_cosines(
    x: Tensor,  # [B, C, H, W] levels 0..255, H and W multiples of 8
    table: Tensor,  # [B, 8, 8], quantisation step of each frequency
) -> Tensor:
    """Transform 8 x 8 blocks to cosines, quantise the coefficients, and transform back to levels."""
    frequency = torch.arange(8, device=x.device, dtype=x.dtype)
    basis = torch.cos(math.pi / 8 * (frequency + 0.5) * frequency[:, None]) / 2
    basis[0] /= math.sqrt(2)  # now orthonormal; the rows are frequencies
    blocks = (x - 128).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [B, C, H/8, W/8, 8, 8]
    table = table[:, None, None, None]
    coefficients = basis @ blocks @ basis.T / table
    # Round halves away from zero, as libjpeg does: with integer pixels and even steps halves are frequent.
    coefficients = (coefficients.abs() + 0.5).floor() * coefficients.sign() * table
    blocks = basis.T @ coefficients @ basis
    return (blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3) + 128).round().clamp(0, 255)

