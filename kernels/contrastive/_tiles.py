"""The matrix of products P[i, j] = <image_i, text_j> in tiles: where it is cut, what a device does with one.

A tile's products are made by torch's matrix product in a workspace of bounded size; the epilogues of
csrc/contrastive.h, where the maths is, reduce them or turn them into the gradient of the logits. `OnCpu` and
`OnCuda` have the same methods; `dalle2_fast._C` is imported when an op first runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# torch puts a product of half-precision matrices into a float32 one from 2.8 on, and adds it from 2.10 on.
_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
_HAS_WIDE_PRODUCT = _VERSION >= (2, 8)
_HAS_WIDE_SUM = _VERSION >= (2, 10)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products, and of gradients before they are rounded to that of the features."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Cut(NamedTuple):
    rows: slice
    columns: slice
    own: int  # the column of the first row's own text, counted from the tile's first column


def cuts(n: int, m: int, first: int, shape: tuple[int, int]) -> Iterator[Cut]:
    """The tiles of [n, m], all rows of the first columns before the next columns."""
    rows, columns = shape
    for left in range(0, m, columns):
        for top in range(0, n, rows):
            yield Cut(slice(top, min(n, top + rows)), slice(left, min(m, left + columns)), first + top - left)


def tile_shape(n: int, m: int, element_bytes: int, budget: int, most_columns: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most `budget` bytes (but 64 rows), of about the size of its mates."""
    columns = min(m, _up(-(-m // -(-m // most_columns)), 64))
    most = max(64, budget // (_up(columns, 8) * element_bytes) // 64 * 64)
    return min(n, _up(-(-n // -(-n // most)), 64)), columns


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def workspace(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix whose rows begin at multiples of 8 elements."""
    return torch.empty(shape[0], _up(shape[1], 8), dtype=dtype, device=device)[:, : shape[1]]


def put_product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, rounded only to the dtype of out, which may be wider than that of a and b."""
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif not (_HAS_WIDE_PRODUCT and a.is_cuda):
        put_product(out, a.to(out.dtype), b.to(out.dtype), add)
    elif not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _HAS_WIDE_SUM:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


class Tiles:
    """Features, the workspace for tiles of their products, and the sums that epilogues leave.

    image [n, D], text [m, D], scale []; `sums` [3] float64, on the device: contrastive.h says what of.
    """

    budget: int  # bytes that a tile may take
    most_columns: int
    dtype: torch.dtype  # of products and gradients
    gradient_dtype: torch.dtype  # of the gradients of a tile's logits
    gain = 1.0  # a factor for these, which keeps them in range

    def __init__(self, image: Tensor, text: Tensor):
        self.image, self.text = image, text
        self.sums = torch.zeros(3, dtype=torch.float64, device=image.device)

    def over(self, loss: str, first: int, gradients: bool = False) -> Iterator[Cut]:
        """The tiles, of a size for the `loss`: "clip", "sigmoid" or "soft"."""
        n, m = self.image.shape[0], self.text.shape[0]
        apart = gradients and self.gradient_dtype != self.dtype
        matrices = self.matrices(loss)
        each = matrices * self.dtype.itemsize + apart * self.gradient_dtype.itemsize
        self._shape = tile_shape(n, m, each or 1, *self.limits(matrices))
        self._matrices = {}
        self._apart = apart
        return cuts(n, m, first, self._shape)

    def matrices(self, loss: str) -> int:
        """How many of products are stored; "soft" has a second one, I I^T + T T^T."""
        return 2 if loss == "soft" else 1

    def limits(self, matrices: int) -> tuple[int, int]:
        return self.budget, self.most_columns

    def room(self, name: str, dtype: torch.dtype, cut: Cut) -> Tensor:
        """What the tiles of one kind share, made when first asked for."""
        if name not in self._matrices:
            self._matrices[name] = workspace(self._shape, dtype, self.image.device)
        rows, columns = cut.rows, cut.columns
        return self._matrices[name][: rows.stop - rows.start, : columns.stop - columns.start]

    def products(self, cut: Cut) -> Tensor:
        tile = self.room("products", self.dtype, cut)
        put_product(tile, self.image[cut.rows], self.text[cut.columns].T)
        return tile

    def alike(self, cut: Cut) -> Tensor:
        """The tile of I I^T + T T^T."""
        tile = self.room("alike", self.dtype, cut)
        put_product(tile, self.image[cut.rows], self.image[cut.columns].T)
        put_product(tile, self.text[cut.rows], self.text[cut.columns].T, add=True)
        return tile

    def gradients(self, cut: Cut) -> Tensor:
        """Where the gradient of a tile's logits goes: into the place of its products, if of their dtype."""
        name = "gradients" if self._apart else "products"
        return self.room(name, self.gradient_dtype if self._apart else self.dtype, cut)

    # Each device has:
    #   own_products() -> of n = m pairs, more exact than in tiles; or None: tiles are exact enough
    #   lse_at_once(first) -> row_lse, column_lse, own products; or None: there is no such kernel here
    #   lse(tile, own, factor, row_lse, column_lse): adds what this tile of factor * scale * P has
    #   gradient(cut, row_lse, column_lse, row_weight, column_weight) -> gain G; sums[0] += gain G P
    #   sigmoid(cut, bias, gradient) -> gain G if `gradient`; sums += losses, G P, G
    #   soft(cut, row_lse, column_lse, alike_row_lse, alike_column_lse, gradient)
    #       -> gain G if `gradient`; sums[:2] += losses, G P


class OnCpu(Tiles):
    """Half precision is widened first: n D and m D numbers, as many as the gradients have."""

    # 512 rows by 8192 columns: a product of D = 512 and one thread takes 29 ns an element (35 GFLOP/s), with
    # half of the rows 31.
    budget, most_columns = 16 << 20, 8192

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor):
        from dalle2_fast import _C

        self.dtype = self.gradient_dtype = wide(image.dtype)
        super().__init__(image.to(self.dtype), text.to(self.dtype))
        self.native, self.code = _C.cpu, _C.DTYPES[str(self.dtype).removeprefix("torch.")]
        self.scale, self.threads = float(scale), torch.get_num_threads()

    def own_products(self) -> None:
        return None

    def lse_at_once(self, first: int) -> None:
        return None

    def lse(self, tile, own, factor, row_lse, column_lse) -> None:
        self.native.lse_epilogue(
            *_place(tile, own), self.code, factor * self.scale, *_addresses(row_lse, column_lse), self.threads
        )

    def gradient(self, cut, row_lse, column_lse, row_weight, column_weight) -> Tensor:
        tile = self.products(cut)
        lse = _addresses(row_lse[cut.rows], column_lse[cut.columns])
        self.sums[0] += self.native.gradient_epilogue(
            *_place(tile, cut.own), self.code, self.scale, *lse, row_weight, column_weight, self.threads
        )
        return tile

    def sigmoid(self, cut, bias, gradient) -> Tensor:
        tile = self.products(cut)
        sums = self.native.sigmoid_epilogue(
            *_place(tile, cut.own), self.code, self.scale, float(bias), gradient, self.threads
        )
        self.sums += torch.tensor(sums, dtype=torch.float64)
        return tile

    def soft(self, cut, row_lse, column_lse, alike_row_lse, alike_column_lse, gradient) -> Tensor:
        tile, alike = self.products(cut), self.alike(cut)
        lse = _addresses(row_lse, column_lse, alike_row_lse, alike_column_lse)
        sums = self.native.soft_epilogue(
            *_place(tile, 0), alike.data_ptr(), self.code, self.scale, *lse, gradient, self.threads
        )
        self.sums[:2] += torch.tensor(sums, dtype=torch.float64)
        return tile


class OnCuda(Tiles):
    """Products are float32; the gradients of a tile's logits have the features' dtype, for the tensor cores.

    Nothing waits for the device. Where the kernels for compute capability 9.0 can run there are no products.
    """

    budget, most_columns = 256 << 20, 16384  # 2730 rows in half precision: a product that fills any GPU
    # 8192 x 8192 where G is all that is stored: its products at D = 512 are 128 blocks of 128 x 256, for the
    # 132 multiprocessors of an H100 or H200. There N = 32768 took 8.04 ms; with 256 MB 7.95, with 64 MB 8.49.
    budget_of_gradients, most_columns_of_gradients = 128 << 20, 8192
    dtype = torch.float32

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor):
        from dalle2_fast import _C

        if image.dtype != text.dtype:
            image, text = image.to(self.dtype), text.to(self.dtype)
        super().__init__(image, text)
        self.native, self.sm90 = _C.cuda, getattr(_C, "sm90", None)
        self.codes = {getattr(torch, name): code for name, code in _C.DTYPES.items()}
        self.gradient_dtype = image.dtype
        # In a softmax over 1e5 texts most are near 1e-5, below the normal numbers of float16.
        self.gain = 1024.0 if image.dtype == torch.float16 else 1.0
        self.scale = scale.to(self.dtype)
        self._scratch = None
        if self.sm90 is not None:
            everything = Cut(slice(0, image.shape[0]), slice(0, text.shape[0]), 0)
            with torch.cuda.device_of(image):
                if self.sm90.obstacle(*self._features(everything)) is not None:
                    self.sm90 = None

    def matrices(self, loss: str) -> int:
        # The kernel for the sigmoid loss knows no gain.
        alone = loss == "clip" or (loss == "sigmoid" and self.gain == 1)
        return 0 if alone and self.sm90 is not None else super().matrices(loss)

    def limits(self, matrices: int) -> tuple[int, int]:
        if matrices > 0:
            return super().limits(matrices)
        return self.budget_of_gradients, self.most_columns_of_gradients

    def own_products(self) -> Tensor | None:
        """Tensor cores do not round a sum, they cut it off, after every 16 terms: at D = 512 an own pair's
        product is too small by 6e-7 of itself."""
        if self.image.dtype not in (torch.float16, torch.bfloat16):
            return None
        own = self.scale.new_empty(self.image.shape[0])
        image, text = ((x.data_ptr(), *x.stride()) for x in (self.image, self.text))
        with torch.cuda.device_of(self.image):
            self.native.own_products(
                *image, *text, *self.image.shape, self.codes[self.image.dtype], own.data_ptr(),
                torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
        return own

    def lse_at_once(self, first: int) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.sm90 is None:
            return None
        (n, width), m = self.image.shape, self.text.shape[0]
        row_lse, column_lse = self.sums.new_empty(n), self.sums.new_empty(m)
        own = self.scale.new_empty(n)
        self._launch(
            self.sm90.lse, *self._features(Cut(slice(0, n), slice(0, m), first)),
            *_addresses(self.scale, row_lse, column_lse, own), scratch=self.sm90.workspace_bytes(n, m, width),
        )  # fmt: skip
        return row_lse, column_lse, own

    def lse(self, tile, own, factor, row_lse, column_lse) -> None:
        self._launch(
            self.native.lse_epilogue, *_place(tile, own), factor,
            *_addresses(self.scale, row_lse, column_lse), scratch=self.native.workspace_bytes(*tile.shape),
        )  # fmt: skip

    def gradient(self, cut, row_lse, column_lse, row_weight, column_weight) -> Tensor:
        out = self.gradients(cut)
        lse = _addresses(self.scale, row_lse[cut.rows], column_lse[cut.columns])
        weights = row_weight * self.gain, column_weight * self.gain
        if self.sm90 is not None:
            self._launch(
                self.sm90.gradient, *self._features(cut), *lse, *weights, out.data_ptr(), out.stride(0),
                self.sums.data_ptr(),
                scratch=self.sm90.workspace_bytes(*out.shape, self.image.shape[1]),
            )  # fmt: skip
            return out
        tile = self.products(cut)
        self._launch(
            self.native.gradient_epilogue, *_place(tile, cut.own), *lse, *weights, *self._target(out),
            scratch=self.native.workspace_bytes(*tile.shape),
        )  # fmt: skip
        return out

    def sigmoid(self, cut, bias, gradient) -> Tensor | None:
        numbers = _addresses(self.scale, bias)
        if self.matrices("sigmoid") == 0:
            out = self.gradients(cut) if gradient else None
            target = (out.data_ptr(), out.stride(0)) if gradient else (0, 0)
            features = self._features(cut)
            rows, columns, width = features[4:7]
            self._launch(
                self.sm90.sigmoid, *features, *numbers, *target, self.sums.data_ptr(),
                scratch=self.sm90.workspace_bytes(rows, columns, width),
            )  # fmt: skip
            return out
        tile = self.products(cut)
        return self._with_target(
            tile, cut, gradient, self.native.sigmoid_epilogue, *_place(tile, cut.own), *numbers
        )

    def soft(self, cut, row_lse, column_lse, alike_row_lse, alike_column_lse, gradient) -> Tensor:
        tile, alike = self.products(cut), self.alike(cut)
        inputs = _addresses(alike, self.scale, row_lse, column_lse, alike_row_lse, alike_column_lse)
        return self._with_target(tile, cut, gradient, self.native.soft_epilogue, *_place(tile, 0), *inputs)

    def _with_target(self, tile: Tensor, cut: Cut, gradient: bool, kernel, *arguments) -> Tensor:
        """Runs the sigmoid or the soft kernel, which know no gain: where there is one, it comes after."""
        scratch = self.native.workspace_bytes(*tile.shape)
        if not gradient:
            self._launch(kernel, *arguments, 0, 0, 0, self.sums.data_ptr(), scratch=scratch)
            return tile
        out = self.gradients(cut)
        target = tile if self.gain != 1 else out
        self._launch(kernel, *arguments, *self._target(target), scratch=scratch)
        return torch.mul(tile, self.gain, out=out) if self.gain != 1 else out

    def _features(self, cut: Cut) -> tuple[int, ...]:
        image, text = self.image[cut.rows], self.text[cut.columns]
        # Rows 0 apart are an obstacle.
        strides = (image.stride(0), text.stride(0)) if image.stride(1) == text.stride(1) == 1 else (0, 0)
        sizes = image.shape[0], text.shape[0], image.shape[1]
        return *_addresses(image, text), *strides, *sizes, cut.own, self.codes[image.dtype]

    def _target(self, out: Tensor) -> tuple[int, ...]:
        """Where and as what a gradient is written, and the sums."""
        return out.data_ptr(), out.stride(0), self.codes[out.dtype], self.sums.data_ptr()

    def _launch(self, kernel, *arguments, scratch: int) -> None:
        """The last two arguments of every kernel: scratch memory and torch's current stream."""
        if self._scratch is None or self._scratch.numel() < scratch:
            self._scratch = torch.empty(scratch, dtype=torch.uint8, device=self.image.device)
        with torch.cuda.device_of(self.image):
            kernel(*arguments, self._scratch.data_ptr(), torch.cuda.current_stream().cuda_stream)


def _addresses(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _place(tile: Tensor, own: int) -> tuple[int, ...]:
    return tile.data_ptr(), tile.stride(0), *tile.shape, own
