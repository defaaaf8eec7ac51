"""Pictures of scenes: anti-aliased analytically from signed distances; any resolution shows the same scene.

Per object: image <- image * fade;  image <- image + coverage * (colour * shade - image), slot after slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .palette import palette
from .scenes import Scenes
from .shapes import SIGNED_DISTANCES, geometry
from .vocabulary import DOTTED, MAX_OBJECTS, STRIPED, TEXTURES

TEXTURE_PERIOD = 0.125  # of the canvas

# Scene pixels rendered at once. CPU: the planes of one shape's objects stay in the second-level cache (twice
# as fast at 64 px as the whole batch at once). Elsewhere: few launches, some GB of temporaries.
CPU_CHUNK_PIXELS, DEVICE_CHUNK_PIXELS = 2**18, 2**22


class _Layers(NamedTuple):
    """What m objects do to the image below them: float32 planes [m, R, R]."""

    coverage: Tensor  # 1 inside, 0 outside
    fade: Tensor  # 1 - soft shadow to the lower right
    shade: Tensor  # light from the top left
    tone: Tensor  # 0 the colour, 1 its second tone; not set (and not read) for solid objects


def render(scenes: Scenes, resolution: int = 64) -> Tensor:
    """The pictures, float32 [n, 3, resolution, resolution] in [0, 1], on the scenes' device."""
    if not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"resolution: expected an int >= 1, got {resolution!r}")
    device = scenes["nobj"].device
    limit = CPU_CHUNK_PIXELS if device.type == "cpu" else DEVICE_CHUNK_PIXELS
    chunk = max(1, limit // resolution**2)
    # Crowded scenes first: then the scenes that use a slot are always the first few, and need no gathering.
    order = torch.argsort(scenes["nobj"], descending=True, stable=True)
    images = torch.empty(len(order), 3, resolution, resolution, device=device)
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        images[part] = _render({key: value[part] for key, value in scenes.items()}, resolution)
    return images


def _render(scenes: Scenes, resolution: int) -> Tensor:
    """One chunk, sorted by falling number of objects."""
    images = _background(scenes, resolution)
    users = [int((scenes["nobj"] > slot).sum()) for slot in range(MAX_OBJECTS)]  # scenes that use each slot

    def flat(key: str) -> Tensor:  # objects, slot after slot: [N, ...]
        return torch.cat([scenes[key][:count, slot] for slot, count in enumerate(users)])

    objects = {key: flat(key) for key in ("shape", "color", "fill", "cx", "cy", "r", "rot", "cj")}
    layers = _object_layers(objects, resolution)
    colors = palette(images.device)
    first = colors.color[objects["color"]] + objects["cj"]
    change = colors.color_second[objects["color"]] + objects["cj"] - first
    begin = 0
    for count in users:
        here = slice(begin, begin + count)
        begin += count
        coverage, fade, shade, tone = (layer[here, None] for layer in layers)
        paint = first[here, :, None, None] * shade
        textured = (objects["fill"][here] > 0).nonzero(as_tuple=True)[0]
        if len(textured):
            start, step = (x[here][textured, :, None, None] for x in (first, change))
            paint[textured] = (start + tone[textured] * step) * shade[textured]
        below = images[:count].mul_(fade)
        below += paint.sub_(below).mul_(coverage)
    return images.clamp_(0, 1)


def _object_layers(objects: Scenes, resolution: int) -> _Layers:
    """All objects' layers [N, R, R], computed shape by shape."""
    shape, radius, rot = objects["shape"], objects["r"], objects["rot"]
    device, table = shape.device, geometry(shape.device)
    pixel = _pixel_centres(resolution, device)
    planes = len(shape), resolution, resolution
    layers = _Layers(*(torch.empty(planes, device=device) for _ in _Layers._fields))
    cos, sin = torch.cos(rot), torch.sin(rot)
    unit = radius * table.scale[shape]
    numbers = torch.bincount(shape, minlength=len(SIGNED_DISTANCES)).tolist()
    groups = torch.argsort(shape, stable=True).split(numbers)
    for kind, (distance, group) in enumerate(zip(SIGNED_DISTANCES, groups, strict=True)):
        if not len(group):
            continue
        dx = pixel[None, None, :] - objects["cx"][group, None, None]
        dy = pixel[None, :, None] - objects["cy"][group, None, None]
        c, s = cos[group, None, None], sin[group, None, None]
        x, y = c * dx + s * dy, -s * dx + c * dy  # in the object's own frame, canvas units
        scale = unit[group, None, None]
        d = distance(x / scale + table.center_x[kind], y / scale + table.center_y[kind]).mul_(scale)
        layers.coverage[group] = (0.5 - d * resolution).clamp_(0, 1)

        r, diagonal = radius[group, None, None], x + y
        layers.shade[group] = (diagonal / (1.4 * r)).clamp_(-1, 1).mul_(-0.09).add_(1)
        rho = (x * x).add_(y * y).add_(1e-9).sqrt_().mul_(1.4142)
        side = diagonal.mul_(0.55).div_(rho).add_(0.45)
        shadow = d.clamp_min_(0).neg_().div_(0.016).exp_().mul_(0.20).mul_(side)
        layers.fade[group] = shadow.clamp_min_(0).neg_().add_(1)

        fill, period = objects["fill"][group], 0.075 + 0.15 * r
        for pattern in (STRIPED, DOTTED):
            chosen = (fill == pattern).nonzero(as_tuple=True)[0]
            if not len(chosen):
                continue
            step = period[chosen]
            if pattern == STRIPED:
                tone = _wave(y[chosen] / step, 0.42, step * resolution)
            else:
                tone = _dots(x[chosen], y[chosen], step * 0.92, 0.30, resolution)
            layers.tone[group[chosen]] = tone
    return layers


def _background(scenes: Scenes, resolution: int) -> Tensor:
    """[n, 3, R, R]: the background's two tones, mixed by its texture."""
    colors = palette(scenes["bg"].device)
    first = (colors.background[scenes["bg"]] + scenes["bj"])[:, :, None, None]
    change = (colors.background_second[scenes["bg"]] + scenes["bj"])[:, :, None, None] - first
    images = first.expand(-1, -1, resolution, resolution).contiguous()
    for texture, name in enumerate(TEXTURES[1:], start=1):
        chosen = (scenes["btex"] == texture).nonzero(as_tuple=True)[0]
        if len(chosen):
            tone = _texture(name, scenes["ph"][chosen], resolution)[:, None]
            images[chosen] = first[chosen] + tone * change[chosen]
    return images


def _texture(name: str, phase: Tensor, resolution: int) -> Tensor:
    """[n, R or 1, R or 1] in [0, 1] (gradient: up to 1.6): how much of the second tone."""
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
    return pixel[None, :, None] * 1.6  # gradient


def _pixel_centres(resolution: int, device: torch.device) -> Tensor:
    return (torch.arange(resolution, device=device, dtype=torch.float32) + 0.5) / resolution


def _wave(phase: Tensor, duty: float, period_pixels: Tensor | float) -> Tensor:
    """Anti-aliased square wave of period 1: 1 on the fraction `duty`."""
    distance = (phase - torch.floor(phase) - 0.5).abs() * 2
    return (0.5 + (duty - distance) * 0.5 * period_pixels).clamp(0, 1)


def _dots(x: Tensor, y: Tensor, period: Tensor | float, radius: float, resolution: int) -> Tensor:
    """Anti-aliased dots on a square grid; `radius` in periods."""
    dx, dy = x / period - torch.floor(x / period) - 0.5, y / period - torch.floor(y / period) - 0.5
    return (0.5 - (torch.sqrt(dx * dx + dy * dy) - radius) * period * resolution).clamp(0, 1)
