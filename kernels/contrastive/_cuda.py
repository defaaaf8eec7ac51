"""The contrastive losses on a GPU: products by torch and epilogues by dalle2_fast._C.cuda, or, on Hopper,
both in one kernel by dalle2_fast._C.sm90."""

from __future__ import annotations

import torch
from torch import Tensor

from ._tiles import Tile, TiledProducts, addresses, tile_arguments


class CudaBackend(TiledProducts):
    """See `Backend`. Nothing waits for the device.

    Products are float32. The gradients of a tile's logits have the dtype of the features, so that the tensor
    cores multiply them. Where the kernels for Hopper can run, products are not stored.
    """

    tile_bytes, max_columns = 256 << 20, 16384  # 2730 rows in half precision: a product that fills any GPU
    # 8192 x 8192 where only G is stored: its products of width 512 are 128 blocks of 128 x 256, for the 132
    # multiprocessors of an H100 or H200. There N = 32768 took 8.04 ms; with 256 MB 7.95, with 64 MB 8.49.
    gradient_tile_bytes, gradient_max_columns = 128 << 20, 8192
    dtype = torch.float32

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor):
        from dalle2_fast import _C

        if image.dtype != text.dtype:
            image, text = image.to(self.dtype), text.to(self.dtype)
        super().__init__(image, text)
        self.native, self.sm90 = _C.cuda, getattr(_C, "sm90", None)
        self.dtype_codes = {getattr(torch, name): code for name, code in _C.DTYPES.items()}
        self.gradient_dtype = image.dtype
        # In a softmax over 1e5 texts most terms are near 1e-5, below the normal numbers of float16.
        self.gradient_scale = 1024.0 if image.dtype == torch.float16 else 1.0
        self.scale = scale.to(self.dtype)
        self._workspace: Tensor | None = None
        if self.sm90 is not None:
            everything = Tile(slice(0, image.shape[0]), slice(0, text.shape[0]), 0)
            with torch.cuda.device_of(image):
                if self.sm90.why_unavailable(*self._feature_arguments(everything)) is not None:
                    self.sm90 = None

    def count_products(self, loss: str) -> int:
        # Hopper's kernel for the sigmoid loss has no gradient_scale.
        in_one_kernel = loss == "clip" or (loss == "sigmoid" and self.gradient_scale == 1)
        return 0 if in_one_kernel and self.sm90 is not None else super().count_products(loss)

    def tile_limits(self, products: int) -> tuple[int, int]:
        if products > 0:
            return super().tile_limits(products)
        return self.gradient_tile_bytes, self.gradient_max_columns

    def positive_products(self) -> Tensor | None:
        """For half precision: tensor cores truncate a sum after every 16 terms instead of rounding it, which
        makes the product of a positive pair too small by 6e-7 of itself at width 512."""
        if self.image.dtype not in (torch.float16, torch.bfloat16):
            return None
        positives = self.scale.new_empty(self.image.shape[0])
        image, text = ((x.data_ptr(), *x.stride()) for x in (self.image, self.text))
        with torch.cuda.device_of(self.image):
            self.native.positive_products(
                *image,
                *text,
                *self.image.shape,
                self.dtype_codes[self.image.dtype],
                positives.data_ptr(),
                torch.cuda.current_stream().cuda_stream,
            )
        return positives

    def lse_at_once(self, first: int) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.sm90 is None:
            return None
        (n, width), m = self.image.shape, self.text.shape[0]
        row_lse, column_lse = self.sums.new_empty(n), self.sums.new_empty(m)
        positives = self.scale.new_empty(n)
        self._launch(
            self.sm90.lse,
            *self._feature_arguments(Tile(slice(0, n), slice(0, m), first)),
            *addresses(self.scale, row_lse, column_lse, positives),
            workspace_bytes=self.sm90.workspace_bytes(n, m, width),
        )
        return row_lse, column_lse, positives

    def lse(self, products, diagonal_offset, factor, row_lse, column_lse) -> None:
        self._launch(
            self.native.lse_epilogue,
            *tile_arguments(products, diagonal_offset),
            factor,
            *addresses(self.scale, row_lse, column_lse),
            workspace_bytes=self.native.workspace_bytes(*products.shape),
        )

    def gradient(self, tile: Tile, row_lse, column_lse, row_weight, column_weight) -> Tensor:
        out = self.gradient_buffer(tile)
        lse = addresses(self.scale, row_lse[tile.rows], column_lse[tile.columns])
        weights = row_weight * self.gradient_scale, column_weight * self.gradient_scale
        if self.sm90 is not None:
            self._launch(
                self.sm90.gradient,
                *self._feature_arguments(tile),
                *lse,
                *weights,
                out.data_ptr(),
                out.stride(0),
                self.sums.data_ptr(),
                workspace_bytes=self.sm90.workspace_bytes(*out.shape, self.image.shape[1]),
            )
            return out
        products = self.products(tile)
        self._launch(
            self.native.gradient_epilogue,
            *tile_arguments(products, tile.diagonal_offset),
            *lse,
            *weights,
            *self._output_arguments(out),
            workspace_bytes=self.native.workspace_bytes(*products.shape),
        )
        return out

    def sigmoid(self, tile: Tile, bias, gradient) -> Tensor | None:
        scalars = addresses(self.scale, bias)
        if self.count_products("sigmoid") == 0:
            out = self.gradient_buffer(tile) if gradient else None
            features = self._feature_arguments(tile)
            rows, columns, width = features[4:7]
            self._launch(
                self.sm90.sigmoid,
                *features,
                *scalars,
                *((out.data_ptr(), out.stride(0)) if gradient else (0, 0)),
                self.sums.data_ptr(),
                workspace_bytes=self.sm90.workspace_bytes(rows, columns, width),
            )
            return out
        products = self.products(tile)
        arguments = *tile_arguments(products, tile.diagonal_offset), *scalars
        return self._apply_epilogue(self.native.sigmoid_epilogue, products, tile, gradient, *arguments)

    def soft(
        self, tile: Tile, row_lse, column_lse, similarity_row_lse, similarity_column_lse, gradient
    ) -> Tensor:
        products, similarity = self.products(tile), self.similarity(tile)
        lse = row_lse, column_lse, similarity_row_lse, similarity_column_lse
        arguments = *tile_arguments(products, 0), *addresses(similarity, self.scale, *lse)
        return self._apply_epilogue(self.native.soft_epilogue, products, tile, gradient, *arguments)

    def _apply_epilogue(self, epilogue, products: Tensor, tile: Tile, gradient: bool, *arguments) -> Tensor:
        """Run the sigmoid or the soft epilogue. They have no gradient_scale, so it is applied afterwards."""
        workspace_bytes = self.native.workspace_bytes(*products.shape)
        if not gradient:
            self._launch(epilogue, *arguments, 0, 0, 0, self.sums.data_ptr(), workspace_bytes=workspace_bytes)
            return products
        out = self.gradient_buffer(tile)
        scaled = self.gradient_scale != 1
        self._launch(
            epilogue,
            *arguments,
            *self._output_arguments(products if scaled else out),
            workspace_bytes=workspace_bytes,
        )
        return torch.mul(products, self.gradient_scale, out=out) if scaled else out

    def _feature_arguments(self, tile: Tile) -> tuple[int, ...]:
        """The `Features` of csrc/contrastive.h as separate arguments."""
        image, text = self.image[tile.rows], self.text[tile.columns]
        # A row stride of 0, which the kernels refuse, says that the rows are not contiguous.
        contiguous = image.stride(1) == text.stride(1) == 1
        strides = (image.stride(0), text.stride(0)) if contiguous else (0, 0)
        sizes = image.shape[0], text.shape[0], image.shape[1]
        dtype_code = self.dtype_codes[image.dtype]
        return *addresses(image, text), *strides, *sizes, tile.diagonal_offset, dtype_code

    def _output_arguments(self, out: Tensor) -> tuple[int, ...]:
        """Address, stride and dtype of a gradient, and the address of the sums."""
        return out.data_ptr(), out.stride(0), self.dtype_codes[out.dtype], self.sums.data_ptr()

    def _launch(self, kernel, *arguments, workspace_bytes: int) -> None:
        """Call a kernel, whose last two arguments are a workspace and torch's current stream."""
        if self._workspace is None or self._workspace.numel() < workspace_bytes:
            self._workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=self.image.device)
        with torch.cuda.device_of(self.image):
            kernel(*arguments, self._workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)
