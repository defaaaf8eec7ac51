"""The products P[i, j] = <image_i, text_j> tile by tile: how the matrix is divided, and the tiles' workspace.

torch's matrix product computes a tile in a workspace of bounded size. The epilogues of csrc/contrastive.h,
which has the formulas, then reduce the tile or turn it into the gradient of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# From torch 2.8 on a product of half-precision matrices can be float32, from 2.10 on it can be added to one.
_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
_MM_HAS_OUT_DTYPE = _VERSION >= (2, 8)
_ADDMM_HAS_OUT_DTYPE = _VERSION >= (2, 10)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products, and of gradients before they are rounded to that of the features."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Tile(NamedTuple):
    """A part of the matrix of products."""

    rows: slice
    columns: slice
    diagonal_offset: int  # the column of the first row's positive, counted from the tile's first column


def iterate_tiles(n: int, m: int, first: int, shape: tuple[int, int]) -> Iterator[Tile]:
    """The tiles of [n, m], all rows of the first columns before the next columns.

    first: the column of row 0's positive.
    """
    rows, columns = shape
    for left in range(0, m, columns):
        for top in range(0, n, rows):
            offset = first + top - left
            yield Tile(slice(top, min(n, top + rows)), slice(left, min(m, left + columns)), offset)


def tile_shape(n: int, m: int, element_bytes: int, tile_bytes: int, max_columns: int) -> tuple[int, int]:
    """Rows and columns of tiles of about equal size, of at most `tile_bytes`, but of 64 rows in any case."""
    columns = min(m, _round_up(-(-m // -(-m // max_columns)), 64))
    max_rows = max(64, tile_bytes // (_round_up(columns, 8) * element_bytes) // 64 * 64)
    return min(n, _round_up(-(-n // -(-n // max_rows)), 64)), columns


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def empty_matrix(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix whose rows begin at multiples of 8 elements."""
    return torch.empty(shape[0], _round_up(shape[1], 8), dtype=dtype, device=device)[:, : shape[1]]


def matmul_into(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b with `add`, rounded only to the dtype of out, which may be a larger one."""
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif not (_MM_HAS_OUT_DTYPE and a.is_cuda):
        matmul_into(out, a.to(out.dtype), b.to(out.dtype), add)
    elif not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _ADDMM_HAS_OUT_DTYPE:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


class TiledProducts:
    """The features of one call, the workspace for tiles of their products, and the sums of the epilogues.

    Args:
        image: [n, D].
        text: [m, D], of the same dtype.
    """

    tile_bytes: int  # upper limit
    max_columns: int  # of a tile
    dtype: torch.dtype  # of products, and of the gradients of the features
    gradient_dtype: torch.dtype  # of the gradients of a tile's logits
    gradient_scale = 1.0  # the gradients of a tile's logits are multiplied by it, to keep them in range

    def __init__(self, image: Tensor, text: Tensor):
        self.image, self.text = image, text
        self.sums = torch.zeros(3, dtype=torch.float64, device=image.device)

    def tiles(self, loss: str, first: int, gradients: bool = False) -> Iterator[Tile]:
        """The tiles of [n, m], of a size that suits the loss.

        Args:
            loss: "clip", "sigmoid" or "soft".
            first: the column of row 0's positive.
            gradients: whether gradients of the logits are stored.
        """
        n, m = self.image.shape[0], self.text.shape[0]
        products = self.count_products(loss)
        self._has_gradient_buffer = gradients and self.gradient_dtype != self.dtype
        element_bytes = products * self.dtype.itemsize
        element_bytes += self._has_gradient_buffer * self.gradient_dtype.itemsize
        self._shape = tile_shape(n, m, element_bytes or 1, *self.tile_limits(products))
        self._buffers: dict[str, Tensor] = {}
        return iterate_tiles(n, m, first, self._shape)

    def count_products(self, loss: str) -> int:
        """How many products are stored per element: "soft" also has the similarity I I^T + T T^T."""
        return 2 if loss == "soft" else 1

    def tile_limits(self, products: int) -> tuple[int, int]:
        """The bytes and the columns of a tile, at most."""
        return self.tile_bytes, self.max_columns

    def buffer(self, name: str, dtype: torch.dtype, tile: Tile) -> Tensor:
        """Memory that all tiles use in turn; allocated at the first request."""
        if name not in self._buffers:
            self._buffers[name] = empty_matrix(self._shape, dtype, self.image.device)
        rows, columns = tile.rows, tile.columns
        return self._buffers[name][: rows.stop - rows.start, : columns.stop - columns.start]

    def products(self, tile: Tile) -> Tensor:
        products = self.buffer("products", self.dtype, tile)
        matmul_into(products, self.image[tile.rows], self.text[tile.columns].T)
        return products

    def similarity(self, tile: Tile) -> Tensor:
        """The tile of I I^T + T T^T."""
        similarity = self.buffer("similarity", self.dtype, tile)
        matmul_into(similarity, self.image[tile.rows], self.image[tile.columns].T)
        matmul_into(similarity, self.text[tile.rows], self.text[tile.columns].T, add=True)
        return similarity

    def gradient_buffer(self, tile: Tile) -> Tensor:
        """Memory for the gradient of a tile's logits: that of its products, if the dtypes are equal."""
        if self._has_gradient_buffer:
            return self.buffer("gradients", self.gradient_dtype, tile)
        return self.buffer("products", self.dtype, tile)


def addresses(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def tile_arguments(products: Tensor, diagonal_offset: int) -> tuple[int, ...]:
    """The `Tile` of csrc/contrastive.h as separate arguments."""
    return products.data_ptr(), products.stride(0), *products.shape, diagonal_offset
