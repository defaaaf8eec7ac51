"""The background of an image: which colour and texture of the world, and the tones it can take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.palette import SHADOW, palette
from dalle2_fast.data.synthetic.rendering import GRADIENT_REACH
from dalle2_fast.data.synthetic.vocabulary import TEXTURES
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.evaluation.reading.tones import segment_distance


class Background(NamedTuple):
    """The background of n images: its index, and the ends of the segment of tones that it can take."""

    index: Tensor  # int64 [n], index into BACKGROUNDS
    first: Tensor  # [n, 3] RGB
    second: Tensor  # [n, 3]
    light: Tensor  # [n, 3]
    dark: Tensor  # [n, 3] shadow included


class BackgroundReader:
    """Finds the backgrounds of images.

    Args:
        world: of the images; only its backgrounds and textures are found.
    """

    def __init__(self, world: World) -> None:
        colors = palette()
        self.textures = tuple(world.textures)
        self.backgrounds = world.ids("backgrounds")
        self.tones = torch.stack([colors.background, colors.background_second])[:, self.backgrounds]

    def read(self, images: Tensor) -> Background:  # [n, 3, H, W]
        """The background whose tones are nearest to the pixels of the frame."""
        frame = torch.ones(images.shape[-2:], dtype=torch.bool)
        frame[2:-2, 2:-2] = False  # objects keep away from the edge by 2.2 pixels of 64
        pixels = images[:, :, frame].transpose(1, 2)  # [n, F, 3]
        first, second = self.tones
        last = first
        if self.textures != ("plain",):
            last = first + (GRADIENT_REACH if "gradient" in self.textures else 1.0) * (second - first)
        distance = segment_distance(pixels[:, None], first[:, None], last[:, None])  # [n, backgrounds, F]
        best = distance.clamp_max(0.4).mean(-1).argmin(1)  # clamped: an object at the edge counts little
        first, second, last = first[best], second[best], last[best]
        along = (last - first)[:, None]
        place = ((pixels - first[:, None]) * along).sum(-1, keepdim=True)
        place = (place / along.square().sum(-1, keepdim=True).clamp_min(1e-9)).clamp(0, 1)
        offset = (pixels - first[:, None] - place * along).median(1).values.clamp(-0.06, 0.06)
        first, second, last = first + offset, second + offset, last + offset
        light, dark = torch.maximum(first, last), torch.minimum(first, last) * SHADOW
        return Background(self.backgrounds[best], first, second, light.clamp(0, 1), dark.clamp(0, 1))

    def read_texture(self, images: Tensor, background: Background, covered: Tensor) -> Tensor:
        """int64 [n]: which texture the uncovered pixels show, from how the second tone is spread."""
        if len(self.textures) == 1:
            return torch.full((len(images),), TEXTURES.index(self.textures[0]))
        along = (background.second - background.first)[:, :, None, None]
        tone = ((images - background.first[:, :, None, None]) * along).sum(1) / along.square().sum(1)
        free = (~covered).float()

        def mean(dims: tuple[int, ...]) -> Tensor:
            return (tone * free).sum(dims, keepdim=True) / free.sum(dims, keepdim=True).clamp_min(1)

        def spread(center: Tensor) -> Tensor:  # [n]: variance around it
            return ((tone - center).square() * free).sum((1, 2)) / free.sum((1, 2)).clamp_min(1)

        level = mean((1, 2))
        total, in_rows, in_columns = spread(level), spread(mean((2,))), spread(mean((1,)))
        shown = {
            "plain": total < 0.05,
            "gradient": in_rows < 0.4 * total,
            "striped": in_columns < 0.5 * total,
            "dotted": level.flatten() < 0.36,
        }
        texture = torch.full((len(images),), TEXTURES.index("checkered"))
        for name, rows in reversed(shown.items()):
            texture = torch.where(rows, TEXTURES.index(name), texture)
        return texture
