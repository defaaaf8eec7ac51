"""csrc/cuda/contrastive.cu on the CPU: the unmodified file, compiled with tests/csrc/cuda_on_cpu."""

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
DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}
GUARD = 64  # bytes behind a workspace that must not be written


class Shape(ctypes.Structure):
    _fields_ = [("products", c_void_p)]
    _fields_ += [(name, c_int64) for name in ("stride", "rows", "columns", "diagonal_offset")]


class Target(ctypes.Structure):
    _fields_ = [("gradient", c_void_p), ("stride", c_int64), ("dtype", c_int), ("sums", c_void_p)]
    _fields_ += [("workspace", c_void_p)]


def build(folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    built = folder / "cuda.so"
    includes = ["-I", ROOT / "tests" / "csrc" / "cuda_on_cpu", "-I", ROOT / "csrc"]
    # No contraction: the kernels call fmaf where they want a fused multiply-add.
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    source = ROOT / "tests" / "csrc" / "cuda_on_cpu" / "contrastive_library.cpp"
    subprocess.run([compiler, *flags, *includes, source, "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    library.set_descending.argtypes = [c_bool]
    library.workspace_bytes.argtypes = [c_int64] * 2
    library.workspace_bytes.restype = c_int64
    shape, target = ctypes.POINTER(Shape), ctypes.POINTER(Target)
    library.lse.argtypes = [shape, c_float] + [c_void_p] * 4
    library.gradient.argtypes = [shape] + [c_void_p] * 3 + [c_float] * 2 + [target]
    library.sigmoid.argtypes = [shape] + [c_void_p] * 2 + [target]
    library.soft.argtypes = [shape] + [c_void_p] * 6 + [target]
    library.positive_products.argtypes = ([c_void_p] + [c_int64] * 2) * 2 + [c_int64] * 2 + [c_int, c_void_p]
    library.run_reverse.argtypes = [c_bool, c_void_p]
    library.run_load_misaligned.argtypes = [c_void_p]
    calls = ("lse", "gradient", "sigmoid", "soft")
    for name in (*calls, "positive_products", "run_reverse", "run_wait_in_half", "run_load_misaligned"):
        getattr(library, name).restype = c_char_p
    return library


class Kernels:
    """The functions of csrc/contrastive.h on torch's tensors, in both orders of threads and blocks.

    Rows are padded with NaN, outputs and workspaces begin as NaN. This shows an element that is read outside
    the tile, or that is not written.
    """

    def __init__(self, library, products: Tensor, diagonal_offset: int = 0) -> None:
        self.library, self.diagonal_offset = library, diagonal_offset
        self.rows, self.columns = products.shape
        self.products = self.padded(products)

    def padded(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        stride = -(-self.columns // 8) * 8 + 8
        matrix = torch.full((self.rows, stride), math.nan, dtype=dtype)
        matrix[:, : self.columns] = values
        return matrix

    def twice(self, name: str, outputs, *arguments) -> list[Tensor]:
        """`outputs()` makes fresh outputs; an argument that is a function is called with them."""
        results = []
        for descending in (False, True):
            self.library.set_descending(descending)
            size = self.library.workspace_bytes(self.rows, self.columns)
            workspace = torch.full((size + GUARD,), 255, dtype=torch.uint8)  # as float32 or float64: NaN
            fresh = outputs()
            shape = Shape(fresh[0].data_ptr() if name == "in place" else self.products.data_ptr(),
                          self.products.shape[1], self.rows, self.columns, self.diagonal_offset)  # fmt: skip
            values = [value(fresh, workspace) if callable(value) else value for value in arguments]
            pointers = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
            failure = getattr(self.library, "gradient" if name == "in place" else name)(shape, *pointers)
            assert failure is None, failure
            assert bool((workspace[size:] == 255).all()), "the workspace is too small"
            results.append(fresh)
        for first, second in zip(*results, strict=True):
            same = first.contiguous().view(torch.uint8) == second.contiguous().view(torch.uint8)
            assert bool(same.all()), "the result depends on the order of threads or blocks"
        return results[0]

    def lse(self, scale: float, factor: float = 1.0, start: tuple[Tensor, Tensor] | None = None):
        if start is None:
            start = tuple(torch.full((n,), -math.inf, dtype=torch.float64) for n in (self.rows, self.columns))
        return self.twice(
            "lse", lambda: [value.clone() for value in start], factor, torch.tensor(scale),
            lambda fresh, _: fresh[0], lambda fresh, _: fresh[1], lambda _, workspace: workspace,
        )  # fmt: skip

    def epilogue(self, name: str, dtype: torch.dtype | None, sums: int, *arguments) -> tuple[Tensor, Tensor]:
        """G, or None for dtype None, and what was added to the sums."""
        count = sums if dtype is not None else 1
        before = torch.arange(1.0, 4.0, dtype=torch.float64)

        def outputs() -> list[Tensor]:
            if name == "in place":
                return [self.products.clone(), before.clone()]
            return [self.padded(torch.tensor(math.nan), dtype or torch.float32), before.clone()]

        def target(fresh, workspace):
            output = (fresh[0].data_ptr(), fresh[0].shape[1], DTYPES[dtype]) if dtype else (None, 0, 0)
            return Target(*output, fresh[1].data_ptr(), workspace.data_ptr())

        gradient, after = self.twice(name, outputs, *arguments, target)
        assert bool(gradient[:, self.columns :].isnan().all()), "written beyond the columns"
        assert torch.equal(after[count:], before[count:])
        return gradient[:, : self.columns] if dtype else None, (after - before)[:count]


def products_of(rows: int, columns: int, diagonal_offset: int = 0) -> Tensor:
    """float32 products of unit features; those of positive pairs are large."""
    generator = torch.Generator().manual_seed(rows + columns)
    text = F.normalize(torch.randn(columns, 24, generator=generator), dim=1)
    image = torch.randn(rows, 24, generator=generator)
    for i in range(max(0, -diagonal_offset), min(rows, columns - diagonal_offset)):
        image[i] += 9 * text[diagonal_offset + i]
    return F.normalize(image, dim=1) @ text.T


def logits_of(products: Tensor, scale: float) -> Tensor:
    """float32, rounded once, then float64"""
    return (products * torch.tensor(scale)).double()


def is_positive(products: Tensor, diagonal_offset: int) -> Tensor:
    rows, columns = products.shape
    return torch.arange(rows)[:, None] + diagonal_offset == torch.arange(columns)


def assert_sums(actual: Tensor, terms: list[Tensor], sizes: list[Tensor] | None = None) -> None:
    """Within 1e-6 of the sum of the terms' magnitudes: sums of float32 terms are not known better."""
    expected = torch.stack([term.sum() for term in terms])
    size = torch.stack([size.abs().sum() for size in sizes or terms])
    assert bool(((actual - expected).abs() <= 1e-6 * size + 1e-37).all()), f"{actual}, expected {expected}"
