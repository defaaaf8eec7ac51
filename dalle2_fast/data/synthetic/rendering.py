"""Images of scenes, anti-aliased analytically from signed distances, so that every resolution shows the same.

Per object, slot after slot:  image <- image * fade;  image <- image + coverage * (colour * shade - image).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.palette import palette
from dalle2_fast.data.synthetic.scenes import Scenes, valid_slots
from dalle2_fast.data.synthetic.shapes import SIGNED_DISTANCES, geometry
from dalle2_fast.data.synthetic.vocabulary import DOTTED, SOLID, STRIPED, TEXTURES

GRADIENT_REACH = 1.6  # the weight of the second tone at the end of a gradient: it runs beyond that tone
TEXTURE_PERIOD = 0.125  # in units of the canvas

# Scene pixels per chunk. On a CPU, a quarter of this number loses 20 % to the overhead of each operation, and
# a larger one takes more memory without a gain. Other devices need few launches; at about 100 bytes per pixel
# their chunk takes 3 GB.
CPU_CHUNK_PIXELS, DEVICE_CHUNK_PIXELS = 2**20, 2**25


class ObjectLayers(NamedTuple):
    """What m objects do to the image below them; float32 planes [m, R, R]."""

    coverage: Tensor  # 1 inside, 0 outside
    fade: Tensor  # 1 - the soft shadow to the lower right
    shade: Tensor  # light from the top left


def render(scenes: Scenes, resolution: int = 64) -> Tensor:
    """The images of scenes.

    Args:
        scenes: n scenes.
        resolution: height and width, in pixels; at least 1.

    Returns:
        float32 [n, 3, resolution, resolution] in [0, 1], on the device of the scenes.

    Raises:
        ValueError: the resolution is no int >= 1.

    Example:
        >>> from dalle2_fast.data import sample_scenes
        >>> render(sample_scenes(2), resolution=16).shape
        torch.Size([2, 3, 16, 16])
    """
    if not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"resolution: expected an int >= 1, got {resolution!r}")
    device = scenes["nobj"].device
    limit = CPU_CHUNK_PIXELS if device.type == "cpu" else DEVICE_CHUNK_PIXELS
    chunk = max(1, limit // resolution**2)
    # Scenes with many objects come first: the scenes that use a slot are then the first rows, and a slice of
    # the images is enough.
    order = torch.argsort(scenes["nobj"], descending=True, stable=True)
    images = torch.empty(len(order), 3, resolution, resolution, device=device)
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        images[part] = _render({key: value[part] for key, value in scenes.items()}, resolution)
    return images


def _render(scenes: Scenes, resolution: int) -> Tensor:
    """The images of one chunk, whose scenes are sorted by decreasing number of objects."""
    images = _background(scenes, resolution)
    users = valid_slots(scenes).sum(0).tolist()  # scenes that use each slot

    def flat(key: str) -> Tensor:  # of all objects, slot after slot: [N, ...]
        return torch.cat([scenes[key][:count, slot] for slot, count in enumerate(users)])

    objects = {key: flat(key) for key in ("shape", "color", "fill", "cx", "cy", "r", "rot", "cj")}
    layers, row = _sorted_layers(objects, resolution)
    tone, tone_row = _tones(objects, resolution)
    colors = palette(images.device)
    first = colors.color[objects["color"]] + objects["cj"]
    change = colors.color_second[objects["color"]] + objects["cj"] - first
    begin = 0
    for count in users:
        here = slice(begin, begin + count)
        begin += count
        coverage, fade, shade = (layer.index_select(0, row[here])[:, None] for layer in layers)
        paint = first[here, :, None, None] * shade
        textured = (objects["fill"][here] != SOLID).nonzero(as_tuple=True)[0]
        if len(textured):
            start, step = (x[here][textured, :, None, None] for x in (first, change))
            pattern = tone[tone_row[here][textured], None]
            paint[textured] = (start + pattern * step) * shade[textured]
        below = images[:count].mul_(fade)
        below += paint.sub_(below).mul_(coverage)
    return images.clamp_(0, 1)


def object_layers(objects: Scenes, resolution: int) -> ObjectLayers:
    """What m objects do to the image below them.

    Args:
        objects: their shape, int64 [m], and cx, cy, r, rot, float32 [m], as scenes have them.
        resolution: height and width, in pixels.

    Example:
        >>> place = dict(cx=torch.tensor([0.5]), cy=torch.tensor([0.5]), r=torch.tensor([0.2]))
        >>> layers = object_layers(dict(shape=torch.tensor([0]), rot=torch.zeros(1), **place), 8)
        >>> layers.coverage[0, 4]
        tensor([0.0000, 0.0000, 0.5212, 1.0000, 1.0000, 0.5212, 0.0000, 0.0000])
    """
    layers, row = _sorted_layers(objects, resolution)
    return ObjectLayers(*(layer[row] for layer in layers))


def _sorted_layers(objects: Scenes, resolution: int) -> tuple[ObjectLayers, Tensor]:
    """The layers [N, R, R] of all objects, sorted by shape, and the row of each object in them, int64 [N]."""
    shape = objects["shape"]
    device, table = shape.device, geometry(shape.device)
    order = torch.argsort(shape, stable=True)
    numbers = torch.bincount(shape, minlength=len(SIGNED_DISTANCES)).tolist()
    planes = len(shape), resolution, resolution
    layers = ObjectLayers(*(torch.empty(planes, device=device) for _ in ObjectLayers._fields))
    pixel, one = _pixel_centres(resolution, device), torch.ones((), device=device)

    def column(values: Tensor) -> Tensor:
        return values[order, None, None]

    cos, sin = column(torch.cos(objects["rot"])), column(torch.sin(objects["rot"]))
    dx = pixel[None, None, :] - column(objects["cx"])
    dy = pixel[None, :, None] - column(objects["cy"])
    radius, unit = column(objects["r"]), column(objects["r"] * table.scale[shape])
    end = 0
    for kind, (distance, number) in enumerate(zip(SIGNED_DISTANCES, numbers, strict=True)):
        if not number:
            continue
        here = slice(end, end + number)
        end += number
        x, y = _local(dx[here], dy[here], cos[here], sin[here])
        d = distance((x / unit[here]).add_(table.center_x[kind]), (y / unit[here]).add_(table.center_y[kind]))
        d.mul_(unit[here])
        torch.mul(d, -resolution, out=layers.coverage[here]).add_(0.5).clamp_(0, 1)

        diagonal = x + y
        shade = torch.div(diagonal, 1.4 * radius[here], out=layers.shade[here])
        shade.clamp_(-1, 1).mul_(-0.09).add_(1)
        rho = (x * x).add_(y * y).add_(1e-9).sqrt_().mul_(1.4142)
        side = diagonal.mul_(0.55).div_(rho).add_(0.45)
        shadow = d.clamp_min_(0).div_(-0.016).exp_().mul_(0.20).mul_(side).clamp_min_(0)
        torch.sub(one, shadow, out=layers.fade[here])
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order), device=device)
    return layers, row


def _tones(objects: Scenes, resolution: int) -> tuple[Tensor, Tensor]:
    """The patterns of objects with stripes or dots, and the row of each object in them.

    Returns:
        float32 [T, R, R]: 0 is the first tone of the colour, 1 its second tone.
        int64 [N]: 0 for solid objects, which have no pattern.
    """
    parts, row = [], torch.zeros_like(objects["fill"])
    pixel = _pixel_centres(resolution, row.device)
    for pattern in (STRIPED, DOTTED):
        chosen = (objects["fill"] == pattern).nonzero(as_tuple=True)[0]
        row[chosen] = sum(map(len, parts)) + torch.arange(len(chosen), device=row.device)
        cx, cy, rot, radius = (objects[key][chosen, None, None] for key in ("cx", "cy", "rot", "r"))
        x, y = _local(pixel - cx, pixel[:, None] - cy, torch.cos(rot), torch.sin(rot))
        period = 0.075 + 0.15 * radius
        if pattern == STRIPED:
            parts.append(_wave(y / period, 0.42, period * resolution))
        else:
            parts.append(_dots(x, y, period * 0.92, 0.30, resolution))
    return torch.cat(parts), row


def _local(dx: Tensor, dy: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets from the centre of an object, in the frame that is rotated with it."""
    return cos * dx + sin * dy, -sin * dx + cos * dy


def _background(scenes: Scenes, resolution: int) -> Tensor:
    """The backgrounds [n, 3, R, R]: two tones, mixed by the texture."""
    colors = palette(scenes["bg"].device)
    first = (colors.background[scenes["bg"]] + scenes["bj"])[:, :, None, None]
    change = (colors.background_second[scenes["bg"]] + scenes["bj"])[:, :, None, None] - first
    tone = torch.zeros(len(first), 1, resolution, resolution, device=first.device)
    for texture, name in enumerate(TEXTURES[1:], start=1):
        chosen = (scenes["btex"] == texture).nonzero(as_tuple=True)[0]
        if len(chosen):
            tone[chosen, 0] = _texture(name, scenes["ph"][chosen], resolution)
    return (tone * change).add_(first)


def _texture(name: str, phase: Tensor, resolution: int) -> Tensor:
    """The weight of the second tone, [n, R or 1, R or 1] in [0, 1]; up to GRADIENT_REACH for a gradient."""
    pixel, period = _pixel_centres(resolution, phase.device), TEXTURE_PERIOD
    x = pixel[None, None, :] + phase[:, 0, None, None] * period * 2
    y = pixel[None, :, None] + phase[:, 1, None, None] * period * 2
    if name == "striped":
        return _wave(x / period, 0.5, period * resolution)
    if name == "checkered":
        across = _wave(x / (2 * period), 0.5, 2 * period * resolution)
        down = _wave(y / (2 * period), 0.5, 2 * period * resolution)
        return across + down - 2 * across * down
    if name == "dotted":
        return _dots(x, y, period, 0.27, resolution)
    return pixel[None, :, None] * GRADIENT_REACH


def _pixel_centres(resolution: int, device: torch.device) -> Tensor:
    return (torch.arange(resolution, device=device, dtype=torch.float32) + 0.5) / resolution


def _wave(phase: Tensor, duty: float, period_pixels: Tensor | float) -> Tensor:
    """An anti-aliased square wave of period 1, which is 1 on the fraction `duty` of it."""
    distance = (phase - torch.floor(phase) - 0.5).abs() * 2
    return (0.5 + (duty - distance) * 0.5 * period_pixels).clamp(0, 1)


def _dots(x: Tensor, y: Tensor, period: Tensor | float, radius: float, resolution: int) -> Tensor:
    """Anti-aliased dots on a square grid; `radius` is in periods."""
    dx, dy = x / period - torch.floor(x / period) - 0.5, y / period - torch.floor(y / period) - 0.5
    return (0.5 - (torch.sqrt(dx * dx + dy * dy) - radius) * period * resolution).clamp(0, 1)
