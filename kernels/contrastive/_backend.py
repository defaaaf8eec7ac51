"""What the losses ask of a device, and which device answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ._cpu import CpuBackend
from ._cuda import CudaBackend
from ._tiles import Tile


class Backend(Protocol):
    """The features of one call and the epilogues on tiles of their products.

    P are the products, L = scale P (+ bias) the logits, G is the gradient of the loss with respect to the
    logits. csrc/contrastive.h has the formulas. All lse are float64. A method that computes G returns
    gradient_scale * G in memory that the next tile overwrites.
    """

    image: Tensor  # [n, D]
    text: Tensor  # [m, D]
    scale: Tensor | float
    sums: Tensor  # [3], float64, on the device
    dtype: torch.dtype  # of products, and of the gradients of the features
    gradient_scale: float

    def tiles(self, loss: str, first: int, gradients: bool = False) -> Iterator[Tile]:
        """The tiles of [n, m] for "clip", "sigmoid" or "soft"; `first` is the column of row 0's positive."""

    def products(self, tile: Tile) -> Tensor:
        """P of the tile."""

    def similarity(self, tile: Tile) -> Tensor:
        """I I^T + T T^T of the tile, for n = m."""

    def positive_products(self) -> Tensor | None:
        """P of the n = m positive pairs, more exact than in tiles; None if tiles are exact enough."""

    def lse_at_once(self, first: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """row_lse [n], column_lse [m] and P of the positives [n]; None if they are computed tile by tile."""

    def lse(
        self, products: Tensor, diagonal_offset: int, factor: float, row_lse: Tensor, column_lse: Tensor
    ) -> None:
        """Add the exponentials of factor * scale * products to the running row_lse and column_lse."""

    def gradient(
        self, tile: Tile, row_lse: Tensor, column_lse: Tensor, row_weight: float, column_weight: float
    ) -> Tensor:
        """G of the contrastive loss, from row_lse [n] and column_lse [m]; sums[0] += gradient_scale * (sum of
        G P)."""

    def sigmoid(self, tile: Tile, bias: Tensor, gradient: bool) -> Tensor | None:
        """G of the sigmoid loss, if `gradient`; sums += the sums of the loss, of G P and of G, unscaled."""

    def soft(
        self,
        tile: Tile,
        row_lse: Tensor,
        column_lse: Tensor,
        similarity_row_lse: Tensor,
        similarity_column_lse: Tensor,
        gradient: bool,
    ) -> Tensor:
        """G with soft targets, if `gradient`, from the lse of this tile; sums[:2] += the sums of the loss and
        of G P, unscaled."""


def make_backend(image: Tensor, text: Tensor, scale: Tensor) -> Backend:
    return (CudaBackend if image.is_cuda else CpuBackend)(image, text, scale)


def full_precision(run: Callable) -> Callable:
    """Run an op without autocast, which would round products, and autograd, which would keep the tiles."""

    @functools.wraps(run)
    def wrapped(image: Tensor, *arguments, **options):
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return run(image, *arguments, **options)

    return wrapped
