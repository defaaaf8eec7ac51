"""Which shape does a soft mask show? Compare it with the analytic mask of every shape of the world.

A mask is shifted by its centroid and scaled to equal area, sampled on a small grid, and compared by
IoU = sum min(a, b) / sum max(a, b)  with the shapes, each at a few angles and slightly different scales.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.data.synthetic.shapes import AREAS, JITTER_DEGREES, SIGNED_DISTANCES, geometry

GRID = 32  # samples along each side; with 24, 1 % of the shapes of small objects are misread
REACH = 1.75  # half side of the grid in radii of the disc of equal area; the crescent reaches 1.62
ANGLES = tuple(math.radians(JITTER_DEGREES * share) for share in (-2 / 3, 0, 2 / 3))
SCALES = (0.95, 1.0, 1.05)  # because the area of a soft mask is not exact
# Radii in pixels for which templates are made: the width of an anti-aliased edge is a pixel, not a radius.
RADII = (3.0, 4.5, 6.0, 8.0, 11.0, 15.0, 20.0)


class Templates:
    """The masks of a world's shapes.

    Args:
        shapes: their indices, int64 [S].

    Example:
        >>> disc = (torch.arange(64) - 31.5).square()
        >>> disc = (disc[:, None] + disc < 100).float()[None]
        >>> shape, fit = Templates(torch.tensor([0, 1])).match(disc, *torch.tensor([[32.0], [32.0], [10.0]]))
        >>> shape, bool(fit > 0.9)
        (tensor([0]), True)
    """

    def __init__(self, shapes: Tensor) -> None:
        self.shapes = shapes
        axis = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.points = torch.stack([x, y], -1) * REACH  # [GRID, GRID, 2]
        self.masks = torch.stack([self._render(radius) for radius in RADII])  # [radii, templates, GRID^2]
        self.owner = shapes.repeat_interleave(len(ANGLES) * len(SCALES))

    def _render(self, pixels: float) -> Tensor:
        """[S * angles * scales, GRID^2]: coverage of shapes whose area is that of a disc of `pixels`."""
        table, rows = geometry(), []
        x, y = self.points.unbind(-1)
        for shape in self.shapes.tolist():
            for angle in ANGLES:
                for scale in SCALES:
                    unit = table.scale[shape] * scale / math.sqrt(AREAS[shape])
                    c, s = math.cos(angle), math.sin(angle)
                    u = (c * x + s * y) / unit + table.center_x[shape]
                    v = (-s * x + c * y) / unit + table.center_y[shape]
                    distance = SIGNED_DISTANCES[shape](u, v) * unit
                    rows.append((0.5 - distance * pixels).clamp(0, 1).flatten())
        return torch.stack(rows)

    def match(
        self,
        mask: Tensor,  # float [N, H, W] in [0, 1]
        x: Tensor,  # [N] centroid in pixels, the first pixel's centre being 0.5
        y: Tensor,  # [N]
        radius: Tensor,  # [N] of the disc of equal area, in pixels
    ) -> tuple[Tensor, Tensor]:
        """The shape with the largest IoU, int64 [N] (index into SHAPES), and the IoU [N]."""
        height, width = mask.shape[-2:]
        centre = torch.stack([x / width, y / height], -1)[:, None, None] * 2 - 1
        step = torch.stack([radius / width, radius / height], -1)[:, None, None] * 2
        grid = centre + self.points.to(mask) * step
        seen = F.grid_sample(mask[:, None], grid, align_corners=False).flatten(1)  # [N, GRID^2]
        bucket = (radius[:, None] / torch.tensor(RADII).to(radius)).log().abs().argmin(1)
        shape, fit = torch.zeros_like(bucket), torch.zeros_like(radius)
        for index in bucket.unique().tolist():
            here = bucket == index
            templates = self.masks[index].to(mask)
            both = seen[here].sum(1, keepdim=True) + templates.sum(1)
            difference = torch.cdist(seen[here], templates, p=1)
            best = ((both - difference) / (both + difference)).max(1)
            shape[here], fit[here] = self.owner.to(shape)[best.indices], best.values
        return shape, fit


def disc_to_shape_radius(radius: Tensor, shape: Tensor) -> Tensor:
    """The radius that scenes give to objects with the area of a disc of `radius`.

    shape: int64, indices into SHAPES.
    """
    return radius / torch.tensor(AREAS).to(radius)[shape].sqrt()
