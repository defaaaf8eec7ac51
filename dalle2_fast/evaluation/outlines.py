"""How clean the outline of one large object is: soft IoU with the ideal shape where that fits best.

    IoU = sum min(a, b) / sum max(a, b),   a: how much of each pixel the object covers, b: the ideal shape

The fit minimises sum (a - b)^2 over centre, radius and rotation. At the edge b = 0.5 - d with the signed
distance d in pixels, whose gradient gives all derivatives, so that a Gauss-Newton step evaluates d once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.data.synthetic.captions import make_captions
from dalle2_fast.data.synthetic.palette import palette, rgb_to_lab
from dalle2_fast.data.synthetic.rendering import object_layers, render
from dalle2_fast.data.synthetic.scenes import Scenes, held_out_pairs, sample_scenes
from dalle2_fast.data.synthetic.shapes import AREAS, SIGNED_DISTANCES, geometry
from dalle2_fast.data.synthetic.vocabulary import SHAPES, SOLID
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.evaluation.reading.components import MIN_AREA, dilate, erode, find_components
from dalle2_fast.evaluation.reading.reader import FOREGROUND
from dalle2_fast.evaluation.reading.tones import norm

BAND = 3  # pixels outside the region of the object in which it may still cover a part of a pixel
# Pairs of (estimate the coverage, fit), each with a number of steps. The first estimate knows only roughly
# where the shadow is; after the second the outlines of renders change by less than 0.001.
STEPS = (8, 4)


def score_outlines(
    generate: Callable[[Tensor, int], Tensor],
    world: World,
    *,
    per_shape: int,
    resolution: int,
    generator: torch.Generator,
    seed: int = 0,
) -> dict | None:
    """Score generated images of one large, solid object on a plain background, and their renders.

    Args:
        generate: (captions as scene tokens int64 [n, 36], seed) -> images [n, 3, R, R] in [0, 1].
        world: of the scenes.
        per_shape: captions for each shape of the world.
        resolution: of the renders, in pixels.
        generator: of the scenes and captions.
        seed: of the images.

    Returns:
        JSON-able: "generated" and "renders", each with the IoU "by_shape", its "mean" and that of the "worst"
        shape, and "captions", their number. None if the world has no such scenes.
    """
    scenes = outline_scenes(world, per_shape, generator)
    if scenes is None:
        return None
    tokens, _ = make_captions(scenes, generator, drop=0, canonical=True)
    sources = {"generated": generate(tokens, seed), "renders": render(scenes, resolution)}
    shape, report = scenes["shape"][:, 0], {"captions": len(tokens)}
    for name, images in sources.items():
        iou = outline_iou(images, shape)
        by_shape = {SHAPES[kind]: iou[shape == kind].mean().item() for kind in shape.unique().tolist()}
        scores = dict(mean=sum(by_shape.values()) / len(by_shape), worst=min(by_shape.values()))
        report[name] = {"by_shape": {kind: round(value, 4) for kind, value in by_shape.items()}}
        report[name] |= {kind: round(value, 4) for kind, value in scores.items()}
    return report


def outline_scenes(world: World, per_shape: int, generator: torch.Generator) -> Scenes | None:
    """Scenes of one large, solid object on a plain background; None if the world has none.

    Every shape comes in turn, because the images of a batch share their noise.
    """
    if "one" not in world.kinds or "solid" not in world.fills or "plain" not in world.textures:
        return None
    choices = dict(colors=world.colors, backgrounds=world.backgrounds, sizes=world.sizes[-1:])
    visible = palette().allowed[:, SOLID, world.ids("backgrounds")].any(1) & ~held_out_pairs()
    parts = []
    for shape in world.shapes:
        if visible[SHAPES.index(shape), world.ids("colors")].any():
            one = World(shapes=[shape], fills=["solid"], textures=["plain"], kinds=["one"], **choices)
            parts.append(sample_scenes(per_shape, generator, "iid", one))
    if not parts:
        return None
    return {key: torch.stack([part[key] for part in parts], 1).flatten(0, 1) for key in parts[0]}


@torch.no_grad()
def outline_iou(images: Tensor, shape: Tensor) -> Tensor:
    """The IoU of the largest object of each image with its ideal shape, where it fits best.

    Args:
        images: float [n, 3, R, R] in [0, 1]: solid objects on plain backgrounds.
        shape: which shape each should show, int64 [n], indices into SHAPES.

    Returns:
        float32 [n] in [0, 1], on the CPU; 0 where there is no object.

    Example:
        >>> from dalle2_fast.data import World, sample_scenes
        >>> world = World(fills=["solid"], sizes=["large"], textures=["plain"], kinds=["one"])
        >>> scenes = sample_scenes(4, torch.Generator().manual_seed(0), world=world)
        >>> bool((outline_iou(render(scenes), scenes["shape"][:, 0]) > 0.97).all())
        True
        >>> outline_iou(torch.ones(1, 3, 64, 64), torch.tensor([0]))
        tensor([0.])
    """
    images, shape = images.float().cpu().clamp(0, 1), shape.cpu()
    found = torch.zeros(len(images))
    frame = torch.ones(images.shape[-2:], dtype=torch.bool)
    frame[2:-2, 2:-2] = False  # objects keep away from the edge by 2.2 pixels of 64
    background = images[:, :, frame].median(-1).values  # [n, 3]
    image, region = _largest_regions(images, background)
    images, background = images[image], background[image]
    place = _start(region, shape[image])
    inner = erode(erode(region))
    inner = torch.where(inner.flatten(1).any(1)[:, None, None], inner, region)
    outer, iou = dilate(region, BAND), torch.zeros(len(image))
    for steps in STEPS:
        coverage = _coverage(images, background, inner, outer, place)
        place, iou = _fit(coverage, place, steps)
    found[image] = iou
    return found


def _largest_regions(images: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """The images that show something, int64 [N], and the largest region of each, bool [N, R, R]."""
    contrast = norm(rgb_to_lab(images.permute(0, 2, 3, 1)) - rgb_to_lab(background)[:, None, None])
    nearby = F.max_pool2d(contrast[:, None], 5, 1, 2)[:, 0]
    smallest = MIN_AREA * images.shape[-2] * images.shape[-1]
    image, region = find_components(contrast > (0.45 * nearby).clamp_min(FOREGROUND), smallest)
    order = region.sum((1, 2)).argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = image[order][1:] != image[order][:-1]
    return image[order[first]], region[order[first]]


def _start(region: Tensor, shape: Tensor) -> Scenes:
    """Upright shapes with the centroids and areas of the regions, as scenes describe objects."""
    side, area = region.shape[-1], region.sum((1, 2))
    pixel = (torch.arange(side) + 0.5) / side
    radius = (area / (math.pi * torch.tensor(AREAS)[shape])).sqrt() / side
    cx, cy = ((region.sum(axis) * pixel).sum(1) / area for axis in (1, 2))
    return dict(shape=shape, cx=cx, cy=cy, r=radius, rot=torch.zeros_like(cx))


def _coverage(
    images: Tensor,  # [N, 3, R, R]
    background: Tensor,  # [N, 3]
    inner: Tensor,  # bool [N, R, R]
    outer: Tensor,  # bool [N, R, R]
    place: Scenes,
) -> Tensor:
    """How much of each pixel the object covers, [N, R, R]: 1 on inner pixels, 0 outside of the outer ones.

    Between them a pixel is a mixture of the object's colour and the background's, with the light and the
    shadow of an object at this place.
    """
    _, fade, shade = (layer[:, None] for layer in object_layers(place, images.shape[-1]))
    paint = torch.where(inner[:, None], images / shade, torch.nan).flatten(2).nanmedian(-1).values
    below = background[:, :, None, None] * fade
    along = paint[:, :, None, None] * shade - below
    part = ((images - below) * along).sum(1) / along.square().sum(1).clamp_min(1e-4)
    return torch.where(inner, 1.0, part.clamp(0, 1) * outer)


def _fit(coverage: Tensor, place: Scenes, steps: int) -> tuple[Scenes, Tensor]:
    """The best of the places that Gauss-Newton comes by, and its IoU [N]."""
    side, best, iou = coverage.shape[-1], place, torch.zeros(len(coverage))
    for _ in range(steps + 1):
        distance, dx, dy = _distance(place, side)
        ideal = (0.5 - distance).clamp(0, 1)
        total, difference = (coverage + ideal).sum((1, 2)), (coverage - ideal).abs().sum((1, 2))
        now = (total - difference) / (total + difference)
        better = now > iou
        best = {key: torch.where(better, place[key], value) for key, value in best.items()}
        iou = torch.where(better, now, iou)

        # All unknowns are lengths in pixels: centre, radius, and rotation times radius.
        down, right = torch.gradient(distance, dim=(1, 2))
        radius = place["r"][:, None, None] * side
        grow, turn = (distance - right * dx - down * dy) / radius, (right * dy - down * dx) / radius
        slope = torch.stack([right, down, -grow, -turn], -1) * (distance.abs() < 1)[..., None]
        slope = slope.flatten(1, 2)  # [N, pixels, 4], derivatives of `ideal`
        normal = slope.mT @ slope
        damping = 1e-3 * normal.diagonal(dim1=1, dim2=2).sum(1) + 1e-6  # a circle has no rotation
        normal = normal + damping[:, None, None] * torch.eye(4)
        error = (coverage - ideal).flatten(1)[..., None]
        step = torch.linalg.solve(normal, slope.mT @ error)[..., 0].clamp(-2, 2)
        place = place | dict(
            cx=place["cx"] + step[:, 0] / side,
            cy=place["cy"] + step[:, 1] / side,
            r=(place["r"] + step[:, 2] / side).clamp_min(2 / side),
            rot=place["rot"] + step[:, 3] / radius[:, 0, 0],
        )
    return best, iou


def _distance(place: Scenes, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The signed distances of the shapes and the offsets from their centres, in pixels, each [N, R, R]."""
    cx, cy, radius, rot = (place[key][:, None, None] for key in ("cx", "cy", "r", "rot"))
    pixel = (torch.arange(side) + 0.5) / side
    dx, dy = torch.broadcast_tensors(pixel - cx, pixel[:, None] - cy)
    x, y = rot.cos() * dx + rot.sin() * dy, rot.cos() * dy - rot.sin() * dx
    table, distance = geometry(), torch.empty_like(x)
    for kind in place["shape"].unique().tolist():
        rows = place["shape"] == kind
        unit = radius[rows] * table.scale[kind]
        u, v = x[rows] / unit + table.center_x[kind], y[rows] / unit + table.center_y[kind]
        distance[rows] = SIGNED_DISTANCES[kind](u, v) * unit
    return distance * side, dx * side, dy * side
