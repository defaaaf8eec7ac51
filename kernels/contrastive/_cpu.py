"""The contrastive losses on the CPU: products by torch, epilogues by dalle2_fast._C.cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from ._tiles import Tile, TiledProducts, addresses, compute_dtype, tile_arguments


class CpuBackend(TiledProducts):
    """See `Backend`. Half precision is converted to float32 first: as much memory as the gradients take."""

    # 512 rows by 8192 columns: a product of width 512 on one thread takes 29 ns per element (35 GFLOP/s), and
    # 31 with half of the rows.
    tile_bytes, max_columns = 16 << 20, 8192

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor):
        from dalle2_fast import _C

        self.dtype = self.gradient_dtype = compute_dtype(image.dtype)
        super().__init__(image.to(self.dtype), text.to(self.dtype))
        self.native, self.dtype_code = _C.cpu, _C.DTYPES[str(self.dtype).removeprefix("torch.")]
        self.scale, self.threads = float(scale), torch.get_num_threads()

    def positive_products(self) -> None:
        return None

    def lse_at_once(self, first: int) -> None:
        return None

    def lse(self, products, diagonal_offset, factor, row_lse, column_lse) -> None:
        self.native.lse_epilogue(
            *tile_arguments(products, diagonal_offset),
            self.dtype_code,
            factor * self.scale,
            *addresses(row_lse, column_lse),
            self.threads,
        )

    def gradient(self, tile: Tile, row_lse, column_lse, row_weight, column_weight) -> Tensor:
        products = self.products(tile)
        self.sums[0] += self.native.gradient_epilogue(
            *tile_arguments(products, tile.diagonal_offset),
            self.dtype_code,
            self.scale,
            *addresses(row_lse[tile.rows], column_lse[tile.columns]),
            row_weight,
            column_weight,
            self.threads,
        )
        return products

    def sigmoid(self, tile: Tile, bias, gradient) -> Tensor:
        products = self.products(tile)
        sums = self.native.sigmoid_epilogue(
            *tile_arguments(products, tile.diagonal_offset),
            self.dtype_code,
            self.scale,
            float(bias),
            gradient,
            self.threads,
        )
        self.sums += torch.tensor(sums, dtype=torch.float64)
        return products

    def soft(
        self, tile: Tile, row_lse, column_lse, similarity_row_lse, similarity_column_lse, gradient
    ) -> Tensor:
        products, similarity = self.products(tile), self.similarity(tile)
        sums = self.native.soft_epilogue(
            *tile_arguments(products, 0),
            similarity.data_ptr(),
            self.dtype_code,
            self.scale,
            *addresses(row_lse, column_lse, similarity_row_lse, similarity_column_lse),
            gradient,
            self.threads,
        )
        self.sums[:2] += torch.tensor(sums, dtype=torch.float64)
        return products
