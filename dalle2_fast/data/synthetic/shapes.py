"""Signed distances of the twelve unit shapes: negative inside, zero on the edge; x right, y down.

Outside of diamonds, stars and the corners of polygons the distance is a lower bound and not exact, which only
softens the shadow there. Source of the formulas: Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.vocabulary import SHAPES, SIZES


def _length(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-12)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return _length(x, y) - 1


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    dx, dy = x.abs() - half_width, y.abs() - half_height
    return torch.sqrt(dx.clamp_min(0) ** 2 + dy.clamp_min(0) ** 2) + torch.maximum(dx, dy).clamp_max(0)


def _polygon(x: Tensor, y: Tensor, corners: int, radius: float, turn: float = 0.0) -> Tensor:
    """A regular polygon: fold the angle onto one corner, then take the distance to one half-plane."""
    angle = torch.atan2(x, -y) + turn
    sector = 2 * math.pi / corners
    angle = angle - sector * torch.round(angle / sector)
    rho = _length(x, y)
    across, along = rho * torch.sin(angle).abs(), rho * torch.cos(angle)
    half = sector / 2  # the direction of the edge's normal
    return across * math.sin(half) + along * math.cos(half) - radius * math.cos(half)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() / 0.68 + y.abs() / 1.12 - 1) * (1 / math.hypot(1 / 0.68, 1 / 1.12))


def _star(x: Tensor, y: Tensor, points: int = 5, outer: float = 1.0, inner: float = 0.45) -> Tensor:
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / points
    angle = (angle - sector * torch.round(angle / sector)).abs()
    rho = _length(x, y)
    across, along = rho * torch.sin(angle), rho * torch.cos(angle)
    # The edge runs from the tip (0, outer) to the inner corner at half a sector.
    inner_x, inner_y = inner * math.sin(sector / 2), inner * math.cos(sector / 2)
    edge_x, edge_y = inner_x, inner_y - outer
    edge_length = math.hypot(edge_x, edge_y)
    normal_x, normal_y = -edge_y / edge_length, edge_x / edge_length
    return across * normal_x + (along - outer) * normal_y


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.32), _box(x, y, 0.32, 1.0))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), -y + 0.55
    lobe = torch.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - math.sqrt(2) / 4
    foot = 0.5 * (x + y).clamp_min(0)
    nearest = torch.minimum(x**2 + (y - 1) ** 2, (x - foot) ** 2 + (y - foot) ** 2)
    body = torch.sqrt(nearest + 1e-12) * torch.sign(x - y)
    return torch.where((x + y) > 1, lobe, body)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_length(x, y) - 0.78).abs() - 0.22


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    bite = 0.82 - torch.sqrt((x - 0.48) ** 2 + y * y + 1e-12)
    return torch.maximum(_circle(x, y), bite)


def _drop(x: Tensor, y: Tensor) -> Tensor:
    """A capsule with a large end below and a small end above."""
    x, y = x.abs(), -(y - 0.35)
    big, small, height = 0.62, 0.05, 1.15
    sine = (big - small) / height
    cosine = math.sqrt(1 - sine * sine)
    along = -sine * x + cosine * y
    below = _length(x, y) - big
    above = torch.sqrt(x * x + (y - height) ** 2 + 1e-12) - small
    flank = x * cosine + y * sine - big
    return torch.where(along < 0, below, torch.where(along > cosine * height, above, flank))


SIGNED_DISTANCES = (
    _circle,
    lambda x, y: _box(x, y, 0.9, 0.9),
    lambda x, y: _polygon(x, y, 3, 1.2),
    _diamond,
    lambda x, y: _polygon(x, y, 5, 1.1),
    lambda x, y: _polygon(x, y, 6, 1.1, math.pi / 6),
    _star,
    _cross,
    _heart,
    _ring,
    _crescent,
    _drop,
)

# The area of each shape, in units of pi * radius^2. Thin shapes of area 1 would look too large.
AREAS = (1.0, 1.0, 0.82, 0.88, 1.0, 1.0, 0.75, 0.85, 1.0, 0.85, 0.75, 0.85)
JITTER_DEGREES = 8  # the largest rotation of an object; extents allow for one degree more

# What `calibrate()` returns, written down so that nothing is computed at import; a test measures it again.
# Per shape: scale for the area above, centroid of the unit shape (x, y), half extent when rotated.
CALIBRATION = (
    (1.0014681, 2.6573415e-11, -3.4156329e-09, 1.0011799),  # circle
    (0.9886738, -4.083682e-10, 4.6516053e-09, 1.0123919),  # square
    (1.174903, -1.2743693e-11, 7.482731e-05, 1.4040971),  # triangle
    (1.3490679, 4.540337e-10, -1.1025974e-08, 1.5042107),  # diamond
    (1.0468569, -4.9777266e-11, -0.0009888789, 1.1452731),  # pentagon
    (1.0009661, -3.489006e-10, 2.047895e-09, 1.0960579),  # hexagon
    (1.336493, 2.8846772e-10, 2.3918157e-05, 1.3298424),  # star
    (1.1209695, 1.321952e-10, 9.526447e-10, 1.1568705),  # cross
    (1.8815159, 5.3598286e-11, -0.10764066, 1.2279538),  # heart
    (1.1143527, 1.8800983e-10, 1.2303585e-10, 1.1140321),  # ring
    (1.2798688, -0.40639618, 2.397413e-09, 1.4037701),  # crescent
    (1.3472992, 2.8493347e-10, 0.20778969, 1.4184227),  # drop
)

SIZE_RADII = ((0.090, 0.105), (0.135, 0.155), (0.195, 0.220))  # smallest and largest, of the canvas


class Geometry(NamedTuple):
    """The constants of the shapes on one device: float32, except for the one of bool."""

    scale: Tensor  # [12] a factor of the radius
    center_x: Tensor  # [12] centroid of the unit shape, which lies at the object's centre
    center_y: Tensor  # [12]
    extent: Tensor  # [12] half side of the box around the rotated shape, per unit radius
    radii: Tensor  # [3 sizes, 2] smallest and largest radius, in units of the canvas
    fill_visible: Tensor  # bool [12, 3 sizes]: do stripes and dots show on it?


@functools.cache
def geometry(device: str | torch.device = "cpu") -> Geometry:
    """The constants of the shapes on a device.

    Example:
        >>> geometry().radii.shape
        torch.Size([3, 2])
    """
    columns = torch.tensor(CALIBRATION).T.contiguous()
    fill_visible = torch.ones(len(SHAPES), len(SIZES), dtype=torch.bool)
    for name in ("ring", "crescent"):  # too thin at any size
        fill_visible[SHAPES.index(name)] = False
    for name in ("triangle", "diamond", "star", "cross", "drop"):  # too pointed when small
        fill_visible[SHAPES.index(name), 0] = False
    tables = (*columns.unbind(0), torch.tensor(SIZE_RADII), fill_visible)
    return Geometry(*(table.to(device) for table in tables))


def calibrate(steps: int = 801) -> list[tuple[float, float, float, float]]:
    """Measure every unit shape on a grid of steps x steps points over [-2, 2]^2: the rows of `CALIBRATION`.

    Example:
        >>> scale, center_x, center_y, extent = calibrate(101)[0]
        >>> round(scale, 1), round(extent, 1)  # of the circle
        (1.0, 1.0)
    """
    axis = torch.linspace(-2, 2, steps)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    rows = []
    for distance, area in zip(SIGNED_DISTANCES, AREAS, strict=True):
        inside = distance(x, y) < 0
        scale = math.sqrt(area * math.pi / (inside.float().mean().item() * 16))
        center_x, center_y = x[inside].mean().item(), y[inside].mean().item()
        extents = []
        for degrees in (-JITTER_DEGREES - 1, 0, JITTER_DEGREES + 1):
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            turned_x = (x[inside] - center_x) * cos - (y[inside] - center_y) * sin
            turned_y = (x[inside] - center_x) * sin + (y[inside] - center_y) * cos
            extents.append(max(turned_x.abs().max().item(), turned_y.abs().max().item()))
        rows.append((scale, center_x, center_y, max(extents) * scale))
    return rows
