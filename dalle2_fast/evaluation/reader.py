"""Read a scene back from the pixels of its picture: plain, deterministic, nothing learned.

1. Background: the colour of the world that the frame of the picture shows.
2. Objects: connected regions that are far from every tone of that background in CIE Lab.
3. Colour (and fill) of an object: the tones of the world nearest to its inner pixels.
   A piece of another colour inside a region is an object of its own, inside the first or touching it.
4. Shape: the analytic mask that fits the object's soft mask best. Size: from the area, given the shape.
   Position and relation: from centroids.

What the reader gets wrong on true renders is printed by `dalle2-fast evaluate` beside every score, as the
ceiling: nothing in a world of solid objects on plain backgrounds, up to 1 % an attribute in the whole world
(the dots of a small object, an object whose colour is that of the background's shadow).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.data.synthetic.palette import SHADOW, palette, rgb_to_lab
from dalle2_fast.data.synthetic.shapes import geometry
from dalle2_fast.data.synthetic.vocabulary import DOTTED, SOLID, STRIPED, TEXTURES
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.evaluation.components import dilate, erode, find_components, holes
from dalle2_fast.evaluation.templates import Templates, disc_to_shape_radius

SIDE = 64  # all pictures are brought to it: more pixels would not decide anything, and less are too few
SLOTS = 8  # objects kept per picture, the largest ones
CHUNK = 32  # pictures at a time: some 100 MB of temporaries
# Lab distances. Objects are at least 30 from their background (palette.FIRST_TONE_DISTANCE), an inner object
# 34 from the outer one; half of that is the border. Second tones may come as near as 24.
FOREGROUND, OTHER_COLOR = 14.0, 18.0
LEAST_AREA = 0.0065  # of the canvas: a third of the smallest object; less is a speck
LEAST_FIT = 0.5  # IoU; true shapes reach 0.69 when blurred by a pixel and noisy, unformed patches about 0.4
LARGE_AREA = 0.08  # more than any medium object
GRADIENT_REACH = 1.6  # how far beyond the second tone a gradient runs, see data.render
ROOM, CELL = 0.465, 0.27  # places of single objects: see data.scenes


class Reading(NamedTuple):
    """What n pictures show, objects from the largest to the smallest. -1 (nan) where there is none; also -1
    as the shape of an object that resembles no shape."""

    background: Tensor  # int64 [n], index into BACKGROUNDS
    texture: Tensor  # int64 [n], index into TEXTURES
    count: Tensor  # int64 [n]
    shape: Tensor  # int64 [n, SLOTS], index into SHAPES
    color: Tensor
    fill: Tensor
    size: Tensor
    holder: Tensor  # int64 [n, SLOTS]: the slot of the object that this one lies in, -1 for none
    x: Tensor  # float32 [n, SLOTS], centroid in units of the canvas
    y: Tensor
    radius: Tensor  # float32 [n, SLOTS], as scenes have it
    fit: Tensor  # float32 [n, SLOTS], IoU with the shape that was read


class _Ground(NamedTuple):
    """The background of n pictures: its index, and the ends of the segment of tones that it can take."""

    index: Tensor  # int64 [n]
    first: Tensor  # [n, 3] RGB
    second: Tensor  # [n, 3]
    light: Tensor  # [n, 3]
    dark: Tensor  # [n, 3] shadow included


class Reader:
    """Reads pictures of scenes of `world` (default: the whole): only what the world has is ever found."""

    def __init__(self, world: World | None = None) -> None:
        self.world = world = world or World()
        colors = palette()
        self.colors, self.backgrounds = world.ids("colors"), world.ids("backgrounds")
        self.tones = rgb_to_lab(torch.stack([colors.color, colors.color_second])[:, self.colors])  # [2, C, 3]
        self.ground = torch.stack([colors.background, colors.background_second])[:, self.backgrounds]
        self.plain = tuple(world.textures) == ("plain",)
        self.solid = tuple(world.fills) == ("solid",)
        self.nested = "two" in world.kinds and "inside" in world.relations
        # Only where an object cannot have tones close to the background's inside it, the border can be drawn
        # half-way between the two, which keeps blurred neighbours apart.
        self.crisp = self.solid and not self.nested
        self.templates = Templates(world.ids("shapes"))
        self.sizes = world.ids("sizes")

    @torch.no_grad()
    def read(self, images: Tensor) -> Reading:  # float [n, 3, H, W] in [0, 1]
        """What the pictures show; read on the CPU."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: expected float [n, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        images = images.float().cpu().clamp(0, 1)
        if images.shape[-2:] != (SIDE, SIDE):
            smaller = min(images.shape[-2:]) > SIDE
            images = F.interpolate(images, (SIDE, SIDE), mode="area" if smaller else "bilinear")
        parts = [self._read(part) for part in images.split(CHUNK)] if len(images) else [self._read(images)]
        return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _read(self, images: Tensor) -> Reading:
        n, _, height, width = images.shape
        ground = self._background(images)
        lab = rgb_to_lab(images.permute(0, 2, 3, 1))  # [n, H, W, 3]
        ends = rgb_to_lab(torch.stack([ground.light, ground.dark]))[:, :, None, None]
        contrast = _segment_distance(lab, *ends)  # [n, H, W]
        nearby = F.max_pool2d(contrast[:, None], 5, 1, 2)[:, 0]
        foreground = contrast > (nearby * (0.45 if self.crisp else 0.2)).clamp_min(FOREGROUND)
        image, region = find_components(foreground, LEAST_AREA * height * width)
        thick = erode(region).flatten(1).any(1)  # the rest are lines
        image, region = image[thick], region[thick]
        objects = self._objects(images, lab, ground, image, region)
        texture = self._texture(images, ground, dilate(foreground, 3))
        return self._table(n, ground.index, texture, objects)

    # ------------------------------------------------------------------------------------------ background

    def _background(self, images: Tensor) -> _Ground:
        frame = torch.ones(images.shape[-2:], dtype=torch.bool)
        frame[2:-2, 2:-2] = False  # objects keep away from the edge by 2.2 pixels of 64
        pixels = images[:, :, frame].transpose(1, 2)  # [n, F, 3]
        first, second = self.ground
        last = first
        if not self.plain:
            last = first + (GRADIENT_REACH if "gradient" in self.world.textures else 1.0) * (second - first)
        distance = _segment_distance(pixels[:, None], first[:, None], last[:, None])  # [n, backgrounds, F]
        best = distance.clamp_max(0.4).mean(-1).argmin(1)  # clamped: an object at the edge has few votes
        first, second, last = first[best], second[best], last[best]
        along = (last - first)[:, None]
        place = ((pixels - first[:, None]) * along).sum(-1, keepdim=True)
        place = (place / along.square().sum(-1, keepdim=True).clamp_min(1e-9)).clamp(0, 1)
        offset = (pixels - first[:, None] - place * along).median(1).values.clamp(-0.06, 0.06)
        first, second, last = first + offset, second + offset, last + offset
        light, dark = torch.maximum(first, last), torch.minimum(first, last) * SHADOW
        return _Ground(self.backgrounds[best], first, second, light.clamp(0, 1), dark.clamp(0, 1))

    def _texture(self, images: Tensor, ground: _Ground, covered: Tensor) -> Tensor:
        """int64 [n]: which texture the uncovered pixels show, from how the second tone is spread."""
        if len(self.world.textures) == 1:
            return torch.full((len(images),), TEXTURES.index(self.world.textures[0]))
        along = (ground.second - ground.first)[:, :, None, None]
        tone = ((images - ground.first[:, :, None, None]) * along).sum(1) / along.square().sum(1)
        free = (~covered).float()

        def mean(dims: tuple[int, ...]) -> Tensor:
            return (tone * free).sum(dims, keepdim=True) / free.sum(dims, keepdim=True).clamp_min(1)

        def spread(center: Tensor) -> Tensor:  # [n]: variance around it
            return ((tone - center).square() * free).sum((1, 2)) / free.sum((1, 2)).clamp_min(1)

        level = mean((1, 2))
        total, in_rows, in_columns = spread(level), spread(mean((2,))), spread(mean((1,)))
        names = {
            "plain": total < 0.05,
            "gradient": in_rows < 0.4 * total,
            "striped": in_columns < 0.5 * total,
            "dotted": level.flatten() < 0.36,
        }
        texture = torch.full((len(images),), TEXTURES.index("checkered"))
        for name, shown in reversed(names.items()):
            texture = torch.where(shown, TEXTURES.index(name), texture)
        return texture

    # --------------------------------------------------------------------------------------------- objects

    def _objects(self, images: Tensor, lab: Tensor, ground: _Ground, image: Tensor, region: Tensor) -> dict:
        """Flat lists [N] over all objects of all pictures."""
        height, width = region.shape[-2:]
        inner = erode(region)
        color, fill, tone = self._color(images, lab, image, inner, self.solid)
        alpha = _coverage(images, image, dilate(region), ground.light[image], ground.dark[image], tone)
        alpha[inner] = 1.0  # the second tone of a fill, or another object in front of this one, is no hole

        # Pieces of another colour within a region.
        owner, row, column = inner.nonzero(as_tuple=True)
        strange = _norm(lab[image[owner], row, column] - rgb_to_lab(tone)[owner]) > OTHER_COLOR
        other = torch.zeros_like(inner)
        other[owner, row, column] = strange
        least = 0.6 * LEAST_AREA * height * width  # `inner` has lost its outline
        owner = (other.sum((1, 2)) >= least).nonzero().flatten()
        if not self.solid:
            owner = owner[fill[owner] == SOLID]
        part, piece = find_components(other[owner], least)
        if not self.solid:  # a fill that was taken for solid shows several pieces; an inner object is one
            single = torch.bincount(part, minlength=len(owner))[part] == 1
            part, piece = part[single], piece[single]
        owner = owner[part]
        piece_color, piece_fill, piece_tone = self._color(images, lab, image[owner], piece, True)
        differs = piece_color != color[owner]  # a darker part of a red object is no object
        owner, piece = owner[differs], piece[differs]
        piece_color, piece_fill, piece_tone = piece_color[differs], piece_fill[differs], piece_tone[differs]
        around = tone[owner]
        piece_alpha = _coverage(images, image[owner], dilate(piece), around, around, piece_tone)
        filled, holder = self._fill_holes(image, region, owner, piece)
        alpha[filled & ~region] = 1.0
        enclosed = ~(dilate(piece, 2) & ~filled[owner]).flatten(1).any(1)
        for index in (~enclosed).nonzero().flatten().tolist():  # neighbours that touch: each its own part
            alpha[owner[index]] *= ~dilate(piece[index : index + 1])[0]

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
            shape=torch.where(fit >= LEAST_FIT, shape, -1),
            color=torch.cat([color, piece_color]),
            fill=torch.cat([fill, piece_fill]),
            size=self.sizes[(radius[:, None].log() - middle).abs().argmin(1)],
            x=x / width,
            y=y / height,
            radius=radius,
            fit=fit,
        )

    def _fill_holes(
        self, image: Tensor, region: Tensor, owner: Tensor, piece: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Regions with those holes filled that show an inner object, and who lies in whom, int64 [N] (-1).

        Such a hole arises where the inner object's edge has a tone of the background.
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

    def _color(
        self, images: Tensor, lab: Tensor, image: Tensor, where: Tensor, solid: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Colour and fill int64 [N], and the colour as measured RGB [N, 3], of the pixels where [N, H, W].

        solid: look for one tone only.
        """
        owner, row, column = where.nonzero(as_tuple=True)
        pixels = lab[image[owner], row, column]  # [P, 3]
        pool = _Pool(owner, len(image))
        distance = torch.cdist(pixels, self.tones[0])  # [P, C]
        # Clamped: pixels that are none of the world's colours at all should not outvote the rest.
        cost, color = pool.mean(distance.clamp_max(40)).min(1)
        fill = torch.full_like(color, SOLID)
        if not solid:
            color, fill = self._two_tones(pixels, pool, where, cost, color)
        typical = distance.argmin(1) == color[owner]
        seen = images.permute(0, 2, 3, 1)[image[owner], row, column]
        tone = pool.sum(seen * typical[:, None]) / pool.sum(typical.float()[:, None]).clamp_min(1)
        color = self.colors[color]
        unseen = pool.sum(typical.float()) == 0
        return color, fill, torch.where(unseen[:, None], palette().color[color], tone)

    def _two_tones(
        self, pixels: Tensor, pool: _Pool, where: Tensor, cost: Tensor, color: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Colour (of this world) and fill, int64 [N], where stripes and dots are possible, too.

        pixels: Lab [P, 3]; cost, color: of the best solid colour. Two tones explain more than one and must
        earn it: a clearly smaller cost, with both of them present, and not as one object inside another.
        """
        first, second = self.tones
        along = second - first
        place = _dot(pixels[:, None] - first, along) / _dot(along, along)  # [P, C]
        distance = _segment_distance(pixels[:, None], first, second)
        fits = distance < 20
        lower, upper = (pool.mean((fits & near).float()) for near in (place < 0.35, place > 0.65))
        both = (lower > 0.15) & (upper > 0.04) & (upper < 0.75)
        two_tone_cost = pool.mean(distance.clamp_max(40)) + torch.where(both, 4.0, 1e3)
        two_tone_cost, two_tone_color = two_tone_cost.min(1)
        tone = torch.zeros(where.shape)
        tone[where] = place.gather(1, two_tone_color[pool.owner, None])[:, 0].clamp(0, 1)
        # A large object has several stripes, or dots, each of them small: a single large piece is an object.
        area = where.shape[-2] * where.shape[-1]
        least = 0.6 * LEAST_AREA * area
        pieces = torch.bincount(find_components(tone > 0.5, least)[0], minlength=len(where))
        large = pool.pixels > LARGE_AREA * area
        textured = (two_tone_cost < cost) & ~(large & (pieces == 1))
        color = torch.where(textured, two_tone_color, color)
        fill = torch.full_like(color, SOLID)
        if "dotted" in self.world.fills:
            fill[textured] = DOTTED
        if "striped" in self.world.fills:
            rows = tone.sum(2, keepdim=True) / where.sum(2, keepdim=True).clamp_min(1)
            level = tone.sum((1, 2), keepdim=True) / where.sum((1, 2), keepdim=True).clamp_min(1)
            total, within_rows = (((tone - center).square() * where).sum((1, 2)) for center in (level, rows))
            fill[textured & ((within_rows < 0.5 * total) | ("dotted" not in self.world.fills))] = STRIPED
        return color, fill

    # ----------------------------------------------------------------------------------------------- table

    def _table(self, n: int, background: Tensor, texture: Tensor, objects: dict[str, Tensor]) -> Reading:
        """Flat objects -> SLOTS columns, the largest first."""
        order = torch.argsort(objects["area"], descending=True, stable=True)
        order = order[torch.argsort(objects["image"][order], stable=True)]
        image, count = objects["image"][order], torch.bincount(objects["image"], minlength=n)
        slot = torch.arange(len(order)) - (count.cumsum(0) - count)[image]
        slot_of = torch.empty_like(order).scatter_(0, order, slot)
        holder = objects["holder"]
        objects["holder"] = torch.where(holder >= 0, slot_of[holder.clamp_min(0)], -1)
        kept = slot < SLOTS
        image, slot, order = image[kept], slot[kept], order[kept]

        def column(name: str) -> Tensor:
            values = objects[name][order]
            empty = float("nan") if values.is_floating_point() else -1
            table = torch.full((n, SLOTS), empty, dtype=values.dtype)
            table[image, slot] = values
            return table

        names = ("shape", "color", "fill", "size", "holder", "x", "y", "radius", "fit")
        return Reading(background, texture, count, **{name: column(name) for name in names})


class _Pool:
    """Sums and means over the pixels of each of `size` objects; owner int64 [P]: whose pixel it is."""

    def __init__(self, owner: Tensor, size: int) -> None:
        self.owner, self.size = owner, size
        self.pixels = torch.bincount(owner, minlength=size).clamp_min(1)

    def sum(self, values: Tensor) -> Tensor:  # [P, ...] -> [size, ...]
        return values.new_zeros(self.size, *values.shape[1:]).index_add_(0, self.owner, values)

    def mean(self, values: Tensor) -> Tensor:  # [P, C] -> [size, C]
        return self.sum(values) / self.pixels[:, None]


def _coverage(
    images: Tensor,  # [n, 3, H, W]
    image: Tensor,  # int64 [N]
    where: Tensor,  # bool [N, H, W]
    light: Tensor,  # [N, 3] the segment of tones behind the object
    dark: Tensor,  # [N, 3]
    tone: Tensor,  # [N, 3] the object's own
) -> Tensor:
    """[N, H, W] in [0, 1]: how much of each pixel in `where` is the object: its distance from the tones
    behind, as a part of the object's own distance."""
    owner, row, column = where.nonzero(as_tuple=True)
    pixels = images.permute(0, 2, 3, 1)[image[owner], row, column]
    full = _segment_distance(tone, light, dark).clamp_min(0.02)
    alpha = torch.zeros(where.shape)
    alpha[where] = (_segment_distance(pixels, light[owner], dark[owner]) / full[owner]).clamp(0, 1)
    return alpha


# Sums over three channels written out: reductions over so short a dimension are ten times slower.
def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()


def _segment_distance(point: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Euclidean distance of points [..., 3] to the segments from start to end, broadcast."""
    along, offset = end - start, point - start
    square = _dot(along, along)
    place = (_dot(offset, along) / square.clamp_min(1e-9)).clamp(0, 1)
    return _norm(offset - place[..., None] * along)
