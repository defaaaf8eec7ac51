"""How the matrix of products is divided into tiles, and the backend for GPUs.

The CPU's epilogues take the place of its kernels; the kernels themselves run in tests/csrc.
"""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace

import pytest
import torch

import dalle2_fast
from tests.support.losses.fused_cases import LOSSES, each_loss, fused, inputs_of, plain
from tests.support.truth import outputs_and_gradients

_C = pytest.importorskip("dalle2_fast._C")

from dalle2_fast.kernels.contrastive import _backend, clip  # noqa: E402
from dalle2_fast.kernels.contrastive._cuda import CudaBackend  # noqa: E402
from dalle2_fast.kernels.contrastive._tiles import iterate_tiles, tile_shape  # noqa: E402


def test_tiles_cover_everything_once():
    for n, m in ((1, 1), (5, 70000), (70000, 5), (4096, 4096), (33000, 33000)):
        for tile_bytes in (1, 1 << 20, 32 << 20):
            rows, columns = shape = tile_shape(n, m, 4, tile_bytes, 8192)
            assert rows * columns * 4 <= max(tile_bytes, 64 * 4 * columns) + 64 * 4 * columns
            assert columns <= 8192
            covered = sum((tile.rows.stop - tile.rows.start) * (tile.columns.stop - tile.columns.start)
                          for tile in iterate_tiles(n, m, 0, shape))  # fmt: skip
            assert covered == n * m


class CudaFunctions:
    """The functions of _C.cuda in terms of those of _C.cpu; addresses are those of tensors on the CPU."""

    def tensor(self, address, shape, stride, dtype):
        size = (shape[0] - 1) * stride + shape[1]
        buffer = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
        return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, (stride, 1))

    def values(self, address, count=1, dtype=torch.float32):
        return self.tensor(address, (1, count), count, dtype)[0]

    def write(self, tile, gradient, stride, code):
        dtype = {code: getattr(torch, name) for name, code in _C.DTYPES.items()}[code]
        self.tensor(gradient, tile.shape, stride, dtype).copy_(tile)

    def workspace_bytes(self, rows, columns):
        return 256

    def lse_epilogue(self, *arguments):
        *fields, factor, scale, row_lse, column_lse, _, _ = arguments
        _C.cpu.lse_epilogue(*fields, 0, factor * float(self.values(scale)), row_lse, column_lse, 1)

    def positive_products(self, *arguments):
        image, image_stride, image_step, text, text_stride, text_step, n, d, code, positives, _ = arguments
        assert (image_step, text_step) == (1, 1)
        dtype = {code: getattr(torch, name) for name, code in _C.DTYPES.items()}[code]
        image = self.tensor(image, (n, d), image_stride, dtype).float()
        text = self.tensor(text, (n, d), text_stride, dtype).float()
        self.values(positives, n).copy_((image * text).sum(1))

    def gradient_epilogue(self, *arguments):
        *fields, scale, rows, columns, weight, other_weight, gradient, stride, code, sums, _, _ = arguments
        tile = self.tensor(fields[0], fields[2:4], fields[1], torch.float32)
        value = _C.cpu.gradient_epilogue(*fields, 0, float(self.values(scale)), rows, columns, weight,
                                         other_weight, 1)  # fmt: skip
        self.values(sums, 1, torch.float64).add_(value)
        self.write(tile, gradient, stride, code)

    def sigmoid_epilogue(self, *arguments):
        *fields, scale, bias, gradient, stride, code, sums, _, _ = arguments
        tile = self.tensor(fields[0], fields[2:4], fields[1], torch.float32)
        values = _C.cpu.sigmoid_epilogue(*fields, 0, float(self.values(scale)), float(self.values(bias)),
                                         bool(gradient), 1)  # fmt: skip
        self.values(sums, 3, torch.float64).add_(torch.tensor(values, dtype=torch.float64))
        if gradient:
            self.write(tile, gradient, stride, code)

    def soft_epilogue(self, *arguments):
        *fields, similarity, scale, a, b, c, d, gradient, stride, code, sums, _, _ = arguments
        tile = self.tensor(fields[0], fields[2:4], fields[1], torch.float32)
        values = _C.cpu.soft_epilogue(*fields, similarity, 0, float(self.values(scale)), a, b, c, d,
                                      bool(gradient), 1)  # fmt: skip
        self.values(sums, 2, torch.float64).add_(torch.tensor(values, dtype=torch.float64))
        if gradient:
            self.write(tile, gradient, stride, code)


@pytest.fixture
def launcher(monkeypatch):
    """CudaBackend on CPU tensors."""
    native = SimpleNamespace(DTYPES=_C.DTYPES, cuda=CudaFunctions())
    monkeypatch.setattr(dalle2_fast, "_C", native, raising=False)
    monkeypatch.setattr(_backend, "CpuBackend", CudaBackend)
    monkeypatch.setattr(CudaBackend, "tile_bytes", 1)
    monkeypatch.setattr(CudaBackend, "max_columns", 64)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_loss
def test_the_gpus_launcher(name, dtype, launcher):
    """Order and number of arguments, workspaces, gradient_scale of float16, the dtype of the gradients."""
    inputs = inputs_of(name, 150, 12, "unit", 20.0, dtype)
    inputs = {key: value.float() if value.dim() == 0 else value for key, value in inputs.items()}
    actual, truth = (outputs_and_gradients(function, inputs, one, keep_dtype=LOSSES[name])
                     for function, one in ((fused(name), dtype), (plain(name), torch.float64)))  # fmt: skip
    for key in truth:
        error = (actual[key].double() - truth[key]).norm() / truth[key].norm()
        assert error < (2e-6 if dtype == torch.float32 else 4e-3), (key, error)


def test_positive_products_that_tensor_cores_truncate(launcher, monkeypatch):
    """Catches a loss computed from the products of tiles, whose sums are truncated; here by far more."""
    inputs = inputs_of("contrastive_loss", 90, 64, "easy", 9.0, torch.bfloat16)
    exact = CudaBackend.products

    def truncated(self, tile):
        products = exact(self, tile)
        positive = self.image[tile.rows, None].float() @ self.text[tile.rows, :, None].float()
        rows, columns = (torch.arange(size) for size in products.shape)
        is_positive = columns == rows[:, None] + tile.diagonal_offset
        return products.sub_(1e-3 * positive[:, 0] * is_positive)

    monkeypatch.setattr(CudaBackend, "products", truncated)
    features = {key: value.bfloat16() if value.dim() else value.float() for key, value in inputs.items()}
    truth = plain("contrastive_loss")(**{key: value.float().double() for key, value in features.items()})
    actual = fused("contrastive_loss")(**features)
    torch.testing.assert_close(actual.double(), truth, rtol=3e-6, atol=0)


def test_a_loss_with_other_positive_logits():
    logits = torch.randn(6, 6, dtype=torch.float64) * 3
    positive = logits.diagonal()
    for exact in (positive, positive + 1e-5, positive - 0.5):
        expected = (logits - positive.diag() + exact.diag()).logsumexp(1) - exact
        actual = clip._lse_above_positive(logits.logsumexp(1), positive, exact)
        torch.testing.assert_close(actual, expected)
    far = torch.tensor([0.0, 0.0, 1e5, math.inf, math.nan], dtype=torch.float64)  # the positive is 0
    nothing = torch.zeros(5, dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 1e5, math.inf, math.nan], dtype=torch.float64)
    torch.testing.assert_close(clip._lse_above_positive(far, nothing, nothing), expected, equal_nan=True)


@pytest.mark.parametrize("n", [300, 32768])
def test_tiles_hold_what_is_stored(n, launcher, monkeypatch):
    """Catches tiles as small as if products were stored in addition to G where Hopper's kernels store none,
    and tiles too large where they are stored: the kernel for the sigmoid loss has no gradient_scale."""
    hopper = SimpleNamespace(why_unavailable=lambda *_: None)
    monkeypatch.setattr(CudaBackend, "tile_bytes", 256 << 20)
    monkeypatch.setattr(CudaBackend, "max_columns", 16384)
    for dtype, loss, sm90, element_bytes in (
        (torch.bfloat16, "clip", hopper, 2), (torch.float16, "clip", hopper, 2),
        (torch.bfloat16, "clip", None, 6),
        (torch.bfloat16, "sigmoid", hopper, 2), (torch.float16, "sigmoid", hopper, 6),
        (torch.bfloat16, "soft", hopper, 10),
    ):  # fmt: skip
        dalle2_fast._C.sm90 = sm90
        backend = CudaBackend(*torch.zeros(2, n, 8, dtype=dtype), torch.tensor(1.0))
        backend.tiles(loss, 0, gradients=True)
        rows, columns = backend._shape
        limit = (128 if element_bytes == 2 else 256) << 20
        assert rows * columns * element_bytes <= limit, (dtype, loss)
        assert n == 300 or rows * columns * element_bytes > 0.75 * limit, (dtype, loss)
