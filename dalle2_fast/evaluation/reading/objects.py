"""Objects from regions of the foreground; a region may show several: one inside or touching another."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.palette import rgb_to_lab
from dalle2_fast.data.synthetic.shapes import geometry
from dalle2_fast.data.synthetic.vocabulary import SOLID
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.evaluation.reading.background import Background
from dalle2_fast.evaluation.reading.colors import ColorReader
from dalle2_fast.evaluation.reading.components import (
    LARGE_AREA,
    MIN_INNER_AREA,
    dilate,
    erode,
    find_components,
    holes,
)
from dalle2_fast.evaluation.reading.templates import Templates, disc_to_shape_radius
from dalle2_fast.evaluation.reading.tones import coverage, norm

OTHER_COLOR = 18.0  # Lab distance; an inner object is at least 34 from the outer one: half of that
MIN_FIT = 0.5  # IoU; true shapes reach 0.69 when blurred by a pixel and noisy, unformed patches about 0.4


class Pieces(NamedTuple):
    """Objects of another colour that regions show: in front of the region's object, or touching it."""

    owner: Tensor  # int64 [M]: the region
    mask: Tensor  # bool [M, H, W]
    color: Tensor  # int64 [M]
    fill: Tensor  # int64 [M]
    tone: Tensor  # [M, 3] RGB


class ObjectReader:
    """Finds the objects that regions of the foreground show.

    Args:
        world: of the images; only its shapes, colours, fills and sizes are found.
    """

    def __init__(self, world: World) -> None:
        self.solid = tuple(world.fills) == ("solid",)
        self.nested = has_nested_objects(world)
        self.sizes = world.ids("sizes")
        self.color_reader = ColorReader(world)
        self.templates = Templates(world.ids("shapes"))

    def read(
        self,
        images: Tensor,  # [n, 3, H, W]
        lab: Tensor,  # [n, H, W, 3]
        background: Background,
        image: Tensor,  # int64 [N], which of the images
        region: Tensor,  # bool [N, H, W]
    ) -> dict[str, Tensor]:
        """Flat lists over all objects of all images: the columns of Reading, and `image` and `area` [N + M].

        The first N objects are those of the regions, the other M are pieces of another colour within them.
        """
        height, width = region.shape[-2:]
        inner = erode(region)
        color, fill, tone = self.color_reader.read(images, lab, image, inner, one_tone=self.solid)
        light, dark = background.light[image], background.dark[image]
        alpha = coverage(images, image, dilate(region), light, dark, tone)
        alpha[inner] = 1.0  # the second tone of a fill, or an object in front of this one, is no hole

        pieces = self._pieces(images, lab, image, inner, color, fill, tone)
        owner = pieces.owner
        behind = tone[owner]
        piece_alpha = coverage(images, image[owner], dilate(pieces.mask), behind, behind, pieces.tone)
        filled, holder = self._fill_holes(image, region, owner, pieces.mask)
        alpha[filled & ~region] = 1.0
        enclosed = ~(dilate(pieces.mask, 2) & ~filled[owner]).flatten(1).any(1)
        for index in (~enclosed).nonzero().flatten().tolist():  # neighbours that touch share no pixel
            alpha[owner[index]] *= ~dilate(pieces.mask[index : index + 1])[0]

        holder = torch.cat([holder, torch.where(enclosed, owner, -1)])
        alpha = torch.cat([alpha, piece_alpha])
        area = alpha.sum((1, 2)).clamp_min(1e-6)
        x = (alpha.sum(1) * (torch.arange(width) + 0.5)).sum(1) / area
        y = (alpha.sum(2) * (torch.arange(height) + 0.5)).sum(1) / area
        disc = (area / math.pi).sqrt()
        shape, fit = self.templates.match(alpha, x, y, disc)
        radius = disc_to_shape_radius(disc, shape) / width
        middle = geometry().radii[self.sizes].log().mean(1)
        return dict(
            image=torch.cat([image, image[owner]]),
            holder=holder,
            area=area,
            shape=torch.where(fit >= MIN_FIT, shape, -1),
            color=torch.cat([color, pieces.color]),
            fill=torch.cat([fill, pieces.fill]),
            size=self.sizes[(radius[:, None].log() - middle).abs().argmin(1)],
            x=x / width,
            y=y / height,
            radius=radius,
            fit=fit,
        )

    def _pieces(
        self,
        images: Tensor,
        lab: Tensor,
        image: Tensor,
        inner: Tensor,  # bool [N, H, W], the regions without their outlines
        color: Tensor,  # int64 [N] of the regions
        fill: Tensor,  # int64 [N]
        tone: Tensor,  # [N, 3]
    ) -> Pieces:
        """The connected parts of regions whose colour differs from that of the region."""
        owner, row, column = inner.nonzero(as_tuple=True)
        strange = norm(lab[image[owner], row, column] - rgb_to_lab(tone)[owner]) > OTHER_COLOR
        other = torch.zeros_like(inner)
        other[owner, row, column] = strange
        min_pixels = MIN_INNER_AREA * inner.shape[-2] * inner.shape[-1]
        owner = (other.sum((1, 2)) >= min_pixels).nonzero().flatten()
        if not self.solid:
            owner = owner[fill[owner] == SOLID]
        part, mask = find_components(other[owner], min_pixels)
        if not self.solid:  # a fill that was mistaken for solid shows several pieces; an inner object is one
            single = torch.bincount(part, minlength=len(owner))[part] == 1
            part, mask = part[single], mask[single]
        owner = owner[part]
        piece_color, piece_fill, piece_tone = self.color_reader.read(
            images, lab, image[owner], mask, one_tone=True
        )
        differs = piece_color != color[owner]  # a darker part of a red object is no object
        return Pieces(*(each[differs] for each in (owner, mask, piece_color, piece_fill, piece_tone)))

    def _fill_holes(
        self, image: Tensor, region: Tensor, owner: Tensor, piece: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fill the holes of regions that contain an object.

        Such a hole arises where the edge of the inner object has a tone of the background.

        Returns:
            filled: the regions, bool [N, H, W].
            holder: int64 [N], the region in which each region lies, -1 for none.
        """
        filled, holder = region.clone(), torch.full_like(image, -1)
        area = region.shape[-2] * region.shape[-1]
        large = region.sum((1, 2)) > 0.5 * LARGE_AREA * area if self.nested else holder > 0
        row, hole = holes(region[large])
        for outer, gap, near in zip(large.nonzero()[row, 0].tolist(), hole, dilate(hole, 3), strict=True):
            within = (image == image[outer]) & (region & gap).flatten(1).any(1)
            holder[within] = outer
            if within.any() or (piece[owner == outer] & near).any():
                filled[outer] |= gap
        return filled, holder


def has_nested_objects(world: World) -> bool:
    """Can an object lie inside another one?"""
    return "two" in world.kinds and "inside" in world.relations
