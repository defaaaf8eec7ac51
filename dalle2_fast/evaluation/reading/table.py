"""What was read, as a table with one row per image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SLOTS = 8  # objects kept per image, the largest ones


class Reading(NamedTuple):
    """What n images show, objects from the largest to the smallest.

    A slot without an object has -1 (nan). An object that resembles no shape has the shape -1.
    """

    background: Tensor  # int64 [n], index into BACKGROUNDS
    texture: Tensor  # int64 [n], index into TEXTURES
    count: Tensor  # int64 [n]
    shape: Tensor  # int64 [n, SLOTS], index into SHAPES
    color: Tensor  # int64 [n, SLOTS], index into COLORS
    fill: Tensor  # int64 [n, SLOTS], index into FILLS
    size: Tensor  # int64 [n, SLOTS], index into SIZES
    holder: Tensor  # int64 [n, SLOTS]: the slot of the object that this one lies in, -1 for none
    x: Tensor  # float32 [n, SLOTS], centroid in units of the canvas
    y: Tensor  # float32 [n, SLOTS]
    radius: Tensor  # float32 [n, SLOTS], as scenes have it
    fit: Tensor  # float32 [n, SLOTS], IoU with the shape that was read


def make_reading(background: Tensor, texture: Tensor, objects: dict[str, Tensor]) -> Reading:
    """Sort flat lists of objects into SLOTS columns per image, the largest first.

    Args:
        background: int64 [n].
        texture: int64 [n].
        objects: from ObjectReader.read.
    """
    n = len(background)
    order = torch.argsort(objects["area"], descending=True, stable=True)
    order = order[torch.argsort(objects["image"][order], stable=True)]
    image, count = objects["image"][order], torch.bincount(objects["image"], minlength=n)
    slot = torch.arange(len(order)) - (count.cumsum(0) - count)[image]
    slot_of = torch.empty_like(order).scatter_(0, order, slot)
    holder = objects["holder"]
    objects = objects | {"holder": torch.where(holder >= 0, slot_of[holder.clamp_min(0)], -1)}
    kept = slot < SLOTS
    image, slot, order = image[kept], slot[kept], order[kept]

    def column(name: str) -> Tensor:
        values = objects[name][order]
        empty = float("nan") if values.is_floating_point() else -1
        table = torch.full((n, SLOTS), empty, dtype=values.dtype)
        table[image, slot] = values
        return table

    return Reading(background, texture, count, *map(column, Reading._fields[3:]))
