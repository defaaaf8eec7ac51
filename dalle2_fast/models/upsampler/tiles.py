"""Denoise a large image in overlapping tiles, so that the memory of a network does not grow with the image.

    output = sum_i w_i net(tile_i)   in every step,   sum_i w_i = 1 at every pixel

Only the network receives tiles. The update of a step and its noise are those of the whole image. The tiles
therefore agree on the noise, because there is only one, and on the image, because every step blends them.

Let a network of convolutions alone have tiles that begin at multiples of the factor by which it reduces the
resolution. If its receptive field reaches at most a quarter of the overlap, the result equals that of the
whole image. Group norms make it an approximation, because their moments are then those of a tile.

Source: Bar-Tal et al., "MultiDiffusion", 2302.08113.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_fast.models.unet.model import UNet
from dalle2_fast.ops._dtypes import compute_dtype


class Tiles:
    """Windows of tile x tile pixels on an image of height x width, and their weights.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        tile: side of a window in pixels, at least 2 * multiple.
        overlap: the smallest number of pixels that neighbours share, at most tile / 2; None is about a
            quarter of a tile.
        multiple: windows begin at multiples of it; tile and overlap must be multiples of it.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        ValueError: tile or overlap is out of range, or not a multiple.

    Example:
        >>> tiles = Tiles(height=8, width=12, tile=8, overlap=4, multiple=2)
        >>> len(tiles), tiles.run(lambda tile: 2 * tile, (), torch.ones(1, 3, 8, 12)).shape
        (2, torch.Size([1, 3, 8, 12]))
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
        # The weights are moved before the first step, because a copy per tile and step would stall a GPU.
        self.rows, self.columns = (
            [(start, weight.to(device, dtype)) for start, weight in windows(side, tile, overlap, multiple)]
            for side in (height, width)
        )

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def run(
        self,
        net: Callable[..., Tensor],
        batched: tuple[Tensor | None, ...],  # [B, ...]
        *images: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C', H, W]
        """Call a network for one tile of one image at a time, and blend its outputs.

        Args:
            net: called as net(*tiles, *rows) with tiles [1, C, tile, tile] and rows [1, ...] of the batched
                tensors; returns [1, C', tile, tile].
            batched: tensors of which each image has one row; None stays None.
            images: tensors that are cut into tiles.
        """
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
    """The tiles for a U-Net and an image, or None if one pass suffices.

    Args:
        unet: the tiles are multiples of its size_multiple and have the device of its weights.
        height: height of the image in pixels.
        width: width of the image in pixels.
        tile: side of a tile in pixels; None for one pass.
        overlap: see `Tiles`.

    Raises:
        ValueError: tile or overlap is impossible, also if one pass would suffice.
    """
    if tile is None:
        if overlap is not None:
            raise ValueError(f"overlap: expected a tile as well, got overlap={overlap} alone")
        return None
    weight = unet.conv_in.weight
    dtype = compute_dtype(weight.dtype)
    tiles = Tiles(height, width, tile, overlap, unet.size_multiple, weight.device, dtype)
    return None if len(tiles) == 1 else tiles


def windows(length: int, tile: int, overlap: int, multiple: int) -> list[tuple[int, Tensor]]:
    """The start and the weights of each window on one axis; the weights sum to 1 at every pixel.

    Where two windows share V pixels, the weight passes from one to the other over the middle V / 2, along a
    cosine. In the outermost V / 4 of a window, where the network saw zero padding in place of the image, the
    weight of the window is 0.

    Args:
        length: pixels on the axis.
        tile: pixels of a window.
        overlap: the smallest number of pixels that neighbours share.
        multiple: windows begin at multiples of it.

    Returns:
        (start, weights float64 [tile]) per window.

    Example:
        >>> [start for start, weights in windows(12, tile=8, overlap=4, multiple=2)]
        [0, 4]
    """
    if length <= tile:
        return [(0, torch.ones(length, dtype=torch.float64))]
    count = math.ceil((length - overlap) / (tile - overlap))
    # Even starts, rounded down to the multiple, which leaves each overlap at least as large as requested.
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
    """0 over the first quarter of the overlap, then up to 1 over its middle half."""
    return 0.5 - 0.5 * torch.cos(math.pi * ((distance - overlap / 4) / (overlap / 2)).clamp(0, 1))
