"""Colours of objects and backgrounds, and which of them can be told apart.

An object may lie on a background only if its tones are far, in CIE Lab, from every tone that the background
takes with its texture and under a soft shadow.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.vocabulary import BACKGROUNDS, COLORS, FILLS, SOLID

COLOR_RGB_255 = (
    (220, 40, 40), (245, 140, 25), (250, 220, 40), (45, 160, 60), (40, 205, 215), (45, 85, 220),
    (130, 50, 175), (250, 130, 185), (125, 75, 35), (250, 250, 250), (20, 20, 22), (130, 130, 132),
)  # fmt: skip
BACKGROUND_RGB_255 = (
    (242, 242, 240), (24, 24, 28), (150, 150, 150), (232, 212, 170),
    (28, 38, 90), (165, 228, 190), (200, 185, 240), (150, 205, 245),
)  # fmt: skip

# The smallest Lab distances allowed: first tone to background, second tone to background, inner to outer
# object.
FIRST_TONE_DISTANCE, SECOND_TONE_DISTANCE, INSIDE_DISTANCE = 30, 24, 34
SHADOW = 0.82  # the smallest factor by which the shadow next to an object darkens the background


class Palette(NamedTuple):
    """The colour tables on one device: float32 RGB in [0, 1], except for the two of bool."""

    color: Tensor  # [12, 3] RGB in [0, 1]
    color_second: Tensor  # [12, 3] the stripes and dots on an object
    background: Tensor  # [8, 3]
    background_second: Tensor  # [8, 3] the other tone of a background's texture
    allowed: Tensor  # bool [12 colours, 3 fills, 8 backgrounds]
    contrast: Tensor  # bool [12, 12]: may an object of one colour lie inside one of the other?


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB [..., 3] in [0, 1] -> CIE L*a*b* under D65 [..., 3].

    Example:
        >>> [round(x) for x in rgb_to_lab(torch.tensor([1.0, 0.0, 0.0])).tolist()]
        [53, 80, 67]
    """
    rgb = rgb.clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = rgb.new_tensor(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ to_xyz.T / rgb.new_tensor([0.95047, 1.0, 1.08883])
    root = torch.where(xyz > 0.008856, xyz.clamp_min(1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _segment_distance(point: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Euclidean distance of points [..., 3] to the segments start-end."""
    along = end - start
    where = ((point - start) * along).sum(-1, keepdim=True)
    where = where / (along * along).sum(-1, keepdim=True).clamp_min(1e-9)
    return ((point - start - where.clamp(0, 1) * along) ** 2).sum(-1).sqrt()


def _second_color(rgb: Tensor) -> Tensor:
    luma = (rgb * rgb.new_tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)
    return torch.where(luma >= 0.40, rgb * 0.5, rgb * 0.5 + 0.5)


def _second_background(rgb: Tensor) -> Tensor:
    return torch.where(rgb.mean(-1, keepdim=True) > 0.35, rgb * 0.84, rgb * 0.86 + 0.14)


def _allowed(color: Tensor, color_second: Tensor, background: Tensor, background_second: Tensor) -> Tensor:
    lightest = rgb_to_lab(torch.maximum(background, background_second))
    darkest = rgb_to_lab(torch.minimum(background, background_second) * SHADOW)
    allowed = torch.zeros(len(COLORS), len(FILLS), len(BACKGROUNDS), dtype=torch.bool)
    for index in range(len(COLORS)):
        first = _segment_distance(rgb_to_lab(color[index])[None], lightest, darkest) > FIRST_TONE_DISTANCE
        second = _segment_distance(rgb_to_lab(color_second[index])[None], lightest, darkest)
        allowed[index] = first & (second > SECOND_TONE_DISTANCE)
        allowed[index, SOLID] = first  # a solid object shows its first tone only
    return allowed


@functools.cache
def palette(device: str | torch.device = "cpu") -> Palette:
    """The colour tables on a device, computed once and on the CPU, so that every device has the same ones.

    Example:
        >>> palette().allowed.shape
        torch.Size([12, 3, 8])
    """
    if torch.device(device) != torch.device("cpu"):
        return Palette(*(table.to(device) for table in palette()))
    color = torch.tensor(COLOR_RGB_255) / 255.0
    background = torch.tensor(BACKGROUND_RGB_255) / 255.0
    color_second, background_second = _second_color(color), _second_background(background)
    allowed = _allowed(color, color_second, background, background_second)
    lab = rgb_to_lab(color)
    contrast = torch.cdist(lab, lab) > INSIDE_DISTANCE
    return Palette(color, color_second, background, background_second, allowed, contrast)
