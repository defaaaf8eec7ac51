"""Distances between colours, each a vector of three channels; and how much of a pixel an object covers."""

from __future__ import annotations

import torch
from torch import Tensor


# The sum over three channels is written out: a reduction over so short a dimension is ten times slower.
def dot(a: Tensor, b: Tensor) -> Tensor:  # [..., 3], broadcast -> [...]
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def norm(a: Tensor) -> Tensor:  # [..., 3] -> [...]
    return dot(a, a).sqrt()


def segment_distance(point: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Euclidean distance of points [..., 3] to the segments from start to end, broadcast.

    Example:
        >>> start, end = torch.zeros(3), torch.tensor([1.0, 0.0, 0.0])
        >>> segment_distance(torch.tensor([[0.5, 2.0, 0.0], [4.0, 0.0, 0.0]]), start, end)
        tensor([2., 3.])
    """
    along, offset = end - start, point - start
    square = dot(along, along)
    place = (dot(offset, along) / square.clamp_min(1e-9)).clamp(0, 1)
    return norm(offset - place[..., None] * along)


def coverage(
    images: Tensor,  # [n, 3, H, W]
    image: Tensor,  # int64 [N], which of the images
    where: Tensor,  # bool [N, H, W]
    light: Tensor,  # [N, 3] the segment of tones behind the object
    dark: Tensor,  # [N, 3]
    tone: Tensor,  # [N, 3] of the object
) -> Tensor:
    """[N, H, W] in [0, 1]: how much of each pixel in `where` the object covers.

    It is the pixel's distance from the tones behind the object, divided by the object's distance from them.
    """
    owner, row, column = where.nonzero(as_tuple=True)
    pixels = images.permute(0, 2, 3, 1)[image[owner], row, column]
    full = segment_distance(tone, light, dark).clamp_min(0.02)
    alpha = torch.zeros(where.shape)
    alpha[where] = (segment_distance(pixels, light[owner], dark[owner]) / full[owner]).clamp(0, 1)
    return alpha
