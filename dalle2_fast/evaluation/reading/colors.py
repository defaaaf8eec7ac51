"""Colour and fill of objects, from their inner pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.palette import palette, rgb_to_lab
from dalle2_fast.data.synthetic.vocabulary import DOTTED, SOLID, STRIPED
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.evaluation.reading.components import LARGE_AREA, MIN_INNER_AREA, find_components
from dalle2_fast.evaluation.reading.tones import dot, segment_distance


class ColorReader:
    """Finds colours and fills of objects.

    Args:
        world: of the images; only its colours and fills are found.
    """

    def __init__(self, world: World) -> None:
        colors = palette()
        self.colors, self.fills = world.ids("colors"), tuple(world.fills)
        self.tones = rgb_to_lab(torch.stack([colors.color, colors.color_second])[:, self.colors])  # [2, C, 3]

    def read(
        self,
        images: Tensor,  # [n, 3, H, W]
        lab: Tensor,  # [n, H, W, 3]
        image: Tensor,  # int64 [N], which of the images
        where: Tensor,  # bool [N, H, W]
        *,
        one_tone: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Colour and fill int64 [N] of the pixels `where`, and their mean RGB [N, 3].

        one_tone: take every fill for solid.
        """
        owner, row, column = where.nonzero(as_tuple=True)
        pixels = lab[image[owner], row, column]  # [P, 3]
        groups = PixelGroups(owner, len(image))
        distance = torch.cdist(pixels, self.tones[0])  # [P, C]
        # Clamped, so that pixels of no colour of the world do not outvote the rest.
        cost, color = groups.mean(distance.clamp_max(40)).min(1)
        fill = torch.full_like(color, SOLID)
        if not one_tone:
            color, fill = self._two_tones(pixels, groups, where, cost, color)
        typical = distance.argmin(1) == color[owner]
        seen = images.permute(0, 2, 3, 1)[image[owner], row, column]
        tone = groups.sum(seen * typical[:, None]) / groups.sum(typical.float()[:, None]).clamp_min(1)
        color = self.colors[color]
        unseen = groups.sum(typical.float()) == 0
        return color, fill, torch.where(unseen[:, None], palette().color[color], tone)

    def _two_tones(
        self, pixels: Tensor, groups: PixelGroups, where: Tensor, cost: Tensor, color: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Colour (an index into self.colors) and fill, int64 [N], where stripes and dots are possible too.

        Two tones always fit better than one. They are accepted only if their cost is clearly smaller, if both
        are present, and if they are not one object inside another.

        pixels: Lab [P, 3]; cost, color: of the best solid colour.
        """
        first, second = self.tones
        along = second - first
        place = dot(pixels[:, None] - first, along) / dot(along, along)  # [P, C]
        distance = segment_distance(pixels[:, None], first, second)
        fits = distance < 20
        lower, upper = (groups.mean((fits & near).float()) for near in (place < 0.35, place > 0.65))
        both = (lower > 0.15) & (upper > 0.04) & (upper < 0.75)
        two_tone_cost = groups.mean(distance.clamp_max(40)) + torch.where(both, 4.0, 1e3)
        two_tone_cost, two_tone_color = two_tone_cost.min(1)
        tone = torch.zeros(where.shape)
        tone[where] = place.gather(1, two_tone_color[groups.owner, None])[:, 0].clamp(0, 1)
        # A large object has several stripes or dots, each of them small: a single large piece is an object.
        area = where.shape[-2] * where.shape[-1]
        pieces = torch.bincount(find_components(tone > 0.5, MIN_INNER_AREA * area)[0], minlength=len(where))
        large = groups.pixels > LARGE_AREA * area
        textured = (two_tone_cost < cost) & ~(large & (pieces == 1))
        color = torch.where(textured, two_tone_color, color)
        fill = torch.full_like(color, SOLID)
        if "dotted" in self.fills:
            fill[textured] = DOTTED
        if "striped" in self.fills:
            rows = tone.sum(2, keepdim=True) / where.sum(2, keepdim=True).clamp_min(1)
            level = tone.sum((1, 2), keepdim=True) / where.sum((1, 2), keepdim=True).clamp_min(1)
            total, within_rows = (((tone - center).square() * where).sum((1, 2)) for center in (level, rows))
            fill[textured & ((within_rows < 0.5 * total) | ("dotted" not in self.fills))] = STRIPED
        return color, fill


class PixelGroups:
    """Sums and means over the pixels of each object.

    Args:
        owner: int64 [P], the object of each pixel.
        size: number of objects.
    """

    def __init__(self, owner: Tensor, size: int) -> None:
        self.owner, self.size = owner, size
        self.pixels = torch.bincount(owner, minlength=size).clamp_min(1)

    def sum(self, values: Tensor) -> Tensor:  # [P, ...] -> [size, ...]
        return values.new_zeros(self.size, *values.shape[1:]).index_add_(0, self.owner, values)

    def mean(self, values: Tensor) -> Tensor:  # [P, C] -> [size, C]
        return self.sum(values) / self.pixels[:, None]
