"""A large picture denoised in overlapping tiles, so that the memory of a net does not grow with the picture.

    output = sum_i w_i net(tile_i)   at every step,   sum_i w_i = 1 at every pixel

Only the net sees tiles. What a step does with the output, and its noise, is of the whole picture: tiles
agree on the noise because there is only one, and on the picture because every step blends them (Bar-Tal et
al. 2023, arXiv 2302.08113, "MultiDiffusion"). A net of convolutions alone, whose tiles begin at multiples of
what it halves, gives what it would give for the whole picture if its reach is at most a quarter of the
overlap; group norms, whose moments are then those of a tile, make it an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_fast.models.unet.model import UNet
from dalle2_fast.ops._dtypes import compute_dtype


class Tiles:
    """Windows of tile x tile pixels on a picture of height x width, and their weights.

    multiple: of pixels, at which windows begin; tile and overlap must be multiples of it. overlap: the least
    number of pixels that neighbours share, at most half a tile; None: about a quarter of one. device, dtype:
    of the weights.
    """

    def __init__(
        self,
        height: int,
        width: int,
        tile: int,
        overlap: int | None,
        multiple: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if not _is_multiple(tile, multiple, 2 * multiple):
            raise ValueError(f"tile: expected a multiple of {multiple} from {2 * multiple} on, got {tile!r}")
        overlap = max(multiple, tile // 4 // multiple * multiple) if overlap is None else overlap
        if not _is_multiple(overlap, multiple, multiple) or overlap > tile // 2:
            raise ValueError(
                f"overlap: expected a multiple of {multiple} up to tile / 2 = {tile // 2}, got {overlap!r}"
            )
        # On the device before the first step: a copy a tile and step would stall a GPU.
        self.rows, self.columns = (
            [(start, weight.to(device, dtype)) for start, weight in windows(side, tile, overlap, multiple)]
            for side in (height, width)
        )

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def run(
        self,
        net: Callable[..., Tensor],
        batched: tuple[Tensor | None, ...],  # [B, ...], a row of each goes with every tile of an image
        *images: Tensor,  # [B, C, H, W], cut into tiles
    ) -> Tensor:  # [B, C', H, W]
        """net(*tiles, *rows of batched) -> [1, C', tile, tile], for one tile of one image at a time."""
        total = None
        for b in range(len(images[0])):
            row = [None if x is None else x[b : b + 1] for x in batched]
            for top, down in self.rows:
                for left, across in self.columns:
                    window = (slice(b, b + 1), slice(None), slice(top, top + len(down)),
                              slice(left, left + len(across)))
                    output = net(*(image[window] for image in images), *row)
                    if total is None:
                        shape = (len(images[0]), output.shape[1], *images[0].shape[2:])
                        total = output.new_zeros(shape)
                    total[window] += down[:, None] * across * output
        return total


def tiles_for(unet: UNet, height: int, width: int, tile: int | None, overlap: int | None) -> Tiles | None:
    """None where one pass does it. One that is not allowed is an error in any case."""
    if tile is None:
        if overlap is not None:
            raise ValueError(f"overlap: expected a tile with it, got overlap={overlap} alone")
        return None
    weight = unet.conv_in.weight
    dtype = compute_dtype(weight.dtype)
    tiles = Tiles(height, width, tile, overlap, unet.size_multiple, weight.device, dtype)
    return None if len(tiles) == 1 else tiles


def windows(length: int, tile: int, overlap: int, multiple: int) -> list[tuple[int, Tensor]]:
    """Start and weights float64 [tile] of each window on one axis; the weights sum to 1 at every pixel.

    Where two windows share V pixels the weight passes from one to the other over the middle half, along a
    cosine: a window's outermost quarter, where the net saw its zero padding instead of the picture, has none.
    """
    if length <= tile:
        return [(0, torch.ones(length, dtype=torch.float64))]
    count = math.ceil((length - overlap) / (tile - overlap))
    # Evenly, and rounded down to the multiple, which leaves each overlap at least as wide as asked for.
    starts = [i * (length - tile) // (count - 1) // multiple * multiple for i in range(count)]
    weights = torch.zeros(count, length, dtype=torch.float64)
    distance = torch.arange(tile, dtype=torch.float64) + 0.5  # from the window's edge
    for i, start in enumerate(starts):
        weight = torch.ones(tile, dtype=torch.float64)
        if i > 0:
            weight *= _rise(distance, starts[i - 1] + tile - start)
        if i < count - 1:
            weight *= _rise(distance, start + tile - starts[i + 1]).flip(0)
        weights[i, start : start + tile] = weight
    weights /= weights.sum(dim=0)  # where three windows meet
    return [(start, weights[i, start : start + tile]) for i, start in enumerate(starts)]


def _is_multiple(value: int, multiple: int, least: int) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value >= least and value % multiple == 0


def _rise(distance: Tensor, overlap: int) -> Tensor:
    """0 for a quarter of the overlap, up to 1 over its half."""
    return 0.5 - 0.5 * torch.cos(math.pi * ((distance - overlap / 4) / (overlap / 2)).clamp(0, 1))
