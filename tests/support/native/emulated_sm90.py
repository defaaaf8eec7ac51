"""csrc/sm90/contrastive.cu on modelled hardware: the unmodified file, compiled with tests/csrc/cuda_on_cpu.

The model (cuda_on_cpu/sm90) has mbarriers, TMA copies with the 128-byte swizzle, and the fragments of wgmma.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
MEBIBYTE = 1 << 20
DTYPES = {torch.float16: 2, torch.bfloat16: 3}
# (copies land late, products are computed late, threads run in descending order)
EARLY_COPIES, LATE_COPIES = (False, True, False), (True, False, True)


class Matrices(ctypes.Structure):
    _fields_ = [("image", c_void_p), ("text", c_void_p)]
    _fields_ += [(name, c_int64) for name in ("image_stride", "text_stride")]
    _fields_ += [(name, c_int64) for name in ("rows", "columns", "width", "diagonal_offset")]
    _fields_ += [("dtype", c_int)]


def build(folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    built = folder / "sm90.so"
    includes = ["-I", ROOT / "tests" / "csrc" / "cuda_on_cpu", "-I", ROOT / "csrc"]  # in this order
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    source = ROOT / "tests" / "csrc" / "cuda_on_cpu" / "sm90_library.cpp"
    subprocess.run([compiler, *flags, *includes, source, "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    library.configure.argtypes = [c_int, c_bool, c_bool, c_bool, c_int64]
    library.set_why_device_unavailable.argtypes = [c_char_p]
    library.workspace_bytes.argtypes = [c_int64] * 3
    library.workspace_bytes.restype = c_int64
    matrices = ctypes.POINTER(Matrices)
    library.why_unavailable.argtypes = [matrices]
    library.lse.argtypes = [matrices] + [c_void_p] * 5
    products = [matrices] + [c_void_p] * 3
    library.gradient.argtypes = products + [c_float] * 2 + [c_void_p, c_int64] + [c_void_p] * 2
    library.sigmoid.argtypes = products + [c_int64] + [c_void_p] * 2
    for name in ("why_unavailable", "lse", "gradient", "sigmoid"):
        getattr(library, name).restype = c_char_p
    return library


class Kernels:
    """The functions of csrc/contrastive.h on torch's tensors; workspaces and outputs begin as NaN."""

    def __init__(self, library, image: Tensor, text: Tensor, diagonal_offset: int) -> None:
        self.library, self.image, self.text = library, image, text
        self.matrices = Matrices(
            image.data_ptr(),
            text.data_ptr(),
            image.stride(0),
            text.stride(0),
            image.shape[0],
            text.shape[0],
            image.shape[1],
            diagonal_offset,
            DTYPES[image.dtype],
        )
        rows, columns = self.shape = image.shape[0], text.shape[0]
        size = library.workspace_bytes(rows, columns, image.shape[1])
        self.workspace = torch.full((size // 4 + 4,), math.nan)
        self.guard = self.workspace[-3:]  # behind the workspace: must stay NaN
        assert library.why_unavailable(self.matrices) is None

    def run(self, name: str, *arguments) -> None:
        pointers = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        failure = getattr(self.library, name)(self.matrices, *pointers, self.workspace.data_ptr())
        assert failure is None, failure
        assert bool(self.guard.isnan().all()), "the workspace is too small"

    def lse(self, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        row_lse, column_lse = (torch.full((size,), math.nan, dtype=torch.float64) for size in self.shape)
        positive_products = torch.full((self.shape[0],), 7.0)
        self.run("lse", torch.tensor(scale), row_lse, column_lse, positive_products)
        self.summed_twice = bool(self.workspace.view(torch.int32)[0])  # the flag, at its beginning
        return row_lse, column_lse, positive_products

    def gradient(self, scale: float, row_lse, column_lse, row_weight, column_weight) -> tuple[Tensor, float]:
        gradient, sums = self._output(), torch.ones(1, dtype=torch.float64)
        arguments = torch.tensor(scale), row_lse, column_lse, row_weight, column_weight
        self.run("gradient", *arguments, gradient, gradient.stride(0), sums)
        return self._written(gradient), sums.item() - 1

    def sigmoid(self, scale: float, bias: float, with_gradient: bool = True) -> tuple[Tensor | None, Tensor]:
        gradient, sums = self._output(), torch.ones(3, dtype=torch.float64)
        output = gradient if with_gradient else None
        self.run("sigmoid", torch.tensor(scale), torch.tensor(bias), output, gradient.stride(0), sums)
        return self._written(gradient) if with_gradient else None, sums - 1

    def _output(self) -> Tensor:
        rows, columns = self.shape
        return torch.full((rows, columns // 8 * 8 + 16), math.nan, dtype=self.image.dtype)

    def _written(self, gradient: Tensor) -> Tensor:
        columns = self.shape[1]
        assert bool(gradient[:, columns:].isnan().all()), "written past the last column"
        return gradient[:, :columns]


def features(rows: int, columns: int, width: int, dtype=torch.bfloat16, *, like=0.3, diagonal_offset=0):
    """Unit vectors, rows 16 bytes apart or more; positive pairs have cosines of about `like` and above."""
    generator = torch.Generator().manual_seed(rows * columns + width)
    text = F.normalize(torch.randn(columns, width, generator=generator), dim=1)
    image = F.normalize(torch.randn(rows, width, generator=generator), dim=1)
    positive = torch.arange(rows) + diagonal_offset
    has = (positive >= 0) & (positive < columns)
    image[has] = F.normalize(image[has] + like / (1 - like) * text[positive[has]], dim=1)
    padded = (width + 7) // 8 * 8 + 8
    # What lies between the rows must not be read.
    stores = [torch.full((count, padded), math.nan, dtype=dtype) for count in (rows, columns)]
    image, text = (store[:, :width].copy_(value) for store, value in zip(stores, (image, text), strict=True))
    return image, text


def truth_of(image: Tensor, text: Tensor, diagonal_offset: int):
    """Products in float64, and a mask of the positive pairs."""
    products = image.double() @ text.double().T
    is_positive = torch.arange(text.shape[0]) == torch.arange(image.shape[0])[:, None] + diagonal_offset
    return products, is_positive


def assert_near(actual: Tensor, truth: Tensor, relative: float, *, floor: float = 0.0) -> None:
    error = (actual.double() - truth).norm() / truth.norm()
    assert error <= relative, f"relative error {error:.2e} > {relative:.0e}"
    worst = ((actual.double() - truth).abs() / (truth.abs() + floor + 1e-300)).max()
    assert floor == 0 or worst <= 4 * relative + 0.02, f"one number is off by {worst:.2e}"


def small(library, image: Tensor, text: Tensor, order=EARLY_COPIES) -> Kernels:
    library.configure(2, *order, MEBIBYTE)
    library.set_why_device_unavailable(None)
    return Kernels(library, image.contiguous(), text.contiguous(), 0)
