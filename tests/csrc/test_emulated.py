"""csrc/contrastive_cuda.cu without a GPU: its text, launches included, runs on the CPU (cuda_on_cpu/),
compared with float64. The emulator knows neither real races nor the rounding of the fast intrinsics."""

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

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}
GUARD = 64  # bytes behind a workspace that have to stay as they were


class Shape(ctypes.Structure):
    _fields_ = [("products", c_void_p)] + [(name, c_int64) for name in ("stride", "rows", "columns", "own")]


class Target(ctypes.Structure):
    _fields_ = [("gradient", c_void_p), ("stride", c_int64), ("dtype", c_int), ("sums", c_void_p)]
    _fields_ += [("workspace", c_void_p)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    built = tmp_path_factory.mktemp("cuda") / "library.so"
    includes = ["-I", ROOT / "tests" / "csrc" / "cuda_on_cpu", "-I", ROOT / "csrc"]
    # No contraction: the kernels say where they want a fused multiply-add.
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
    library.own_products.argtypes = ([c_void_p] + [c_int64] * 2) * 2 + [c_int64] * 2 + [c_int, c_void_p]
    library.run_reverse.argtypes = [c_bool, c_void_p]
    library.run_load_misaligned.argtypes = [c_void_p]
    calls = ("lse", "gradient", "sigmoid", "soft")
    for name in (*calls, "own_products", "run_reverse", "run_wait_in_half", "run_load_misaligned"):
        getattr(library, name).restype = c_char_p
    yield library
    library.set_descending(False)


class Kernels:
    """The calls of csrc/contrastive.h on torch's tensors, in both orders of threads and blocks.

    Rows are padded with NaN, outputs and workspaces begin as NaN: an element that is read outside the tile or
    not written shows.
    """

    def __init__(self, library, products: Tensor, own: int = 0) -> None:
        self.library, self.own = library, own
        self.rows, self.columns = products.shape
        self.products = self.padded(products)

    def padded(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        stride = -(-self.columns // 8) * 8 + 8
        matrix = torch.full((self.rows, stride), math.nan, dtype=dtype)
        matrix[:, : self.columns] = values
        return matrix

    def twice(self, name: str, outputs, *arguments) -> list[Tensor]:
        """`outputs()` makes fresh outputs; arguments that are functions take them."""
        results = []
        for descending in (False, True):
            self.library.set_descending(descending)
            size = self.library.workspace_bytes(self.rows, self.columns)
            workspace = torch.full((size + GUARD,), 255, dtype=torch.uint8)  # as float32 or float64: NaN
            fresh = outputs()
            shape = Shape(fresh[0].data_ptr() if name == "in place" else self.products.data_ptr(),
                          self.products.shape[1], self.rows, self.columns, self.own)  # fmt: skip
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
            place = (fresh[0].data_ptr(), fresh[0].shape[1], DTYPES[dtype]) if dtype else (None, 0, 0)
            return Target(*place, fresh[1].data_ptr(), workspace.data_ptr())

        gradient, after = self.twice(name, outputs, *arguments, target)
        assert bool(gradient[:, self.columns :].isnan().all()), "written beyond the columns"
        assert torch.equal(after[count:], before[count:])
        return gradient[:, : self.columns] if dtype else None, (after - before)[:count]


def products_of(rows: int, columns: int, own: int = 0) -> Tensor:
    """float32 products of unit features; own pairs are alike."""
    generator = torch.Generator().manual_seed(rows + columns)
    text = F.normalize(torch.randn(columns, 24, generator=generator), dim=1)
    image = torch.randn(rows, 24, generator=generator)
    for i in range(max(0, -own), min(rows, columns - own)):
        image[i] += 9 * text[own + i]
    return F.normalize(image, dim=1) @ text.T


def logits_of(products: Tensor, scale: float) -> Tensor:
    """float32, rounded once, then float64"""
    return (products * torch.tensor(scale)).double()


def is_own(products: Tensor, own: int) -> Tensor:
    rows, columns = products.shape
    return torch.arange(rows)[:, None] + own == torch.arange(columns)


def assert_sums(actual: Tensor, terms: list[Tensor], sizes: list[Tensor] | None = None) -> None:
    """To 1e-6 of the sum of the terms' sizes: of float32 terms nothing closer is known."""
    expected = torch.stack([term.sum() for term in terms])
    size = torch.stack([size.abs().sum() for size in sizes or terms])
    assert bool(((actual - expected).abs() <= 1e-6 * size + 1e-37).all()), f"{actual}, expected {expected}"


# One block and less, a block's exact size, one more than a block in both directions; odd everywhere.
SIZES = [(1, 1), (3, 5), (64, 1024), (65, 1025), (97, 1030)]


# --------------------------------------------------------------------------------------------------- emulator


def test_emulator_notices_faults(library):
    # Catches: an emulator that lets a faulty kernel pass.
    for barrier in (True, False):
        for descending in (True, False):
            library.set_descending(descending)
            before = torch.rand(64)  # new numbers each time: shared memory keeps those of the last call
            values = before.clone()
            assert library.run_reverse(barrier, values.data_ptr()) is None
            assert torch.equal(values, before.flip(0)) == barrier
    assert b"deadlock" in library.run_wait_in_half()
    assert b"misaligned" in library.run_load_misaligned(torch.zeros(16).data_ptr())


# -------------------------------------------------------------------------------------------------------- lse


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("scale, factor", [(1.0, 1.0), (100.0, 1.0), (-28.4, 0.5)])
def test_lse(library, rows, columns, scale, factor):
    # Catches: edges of blocks, a lost row or column, the shift, float32 where an easy pair needs more.
    products = products_of(rows, columns)
    row_lse, column_lse = Kernels(library, products).lse(scale, factor)
    logits = logits_of(products, factor * scale)
    torch.testing.assert_close(row_lse, logits.logsumexp(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(column_lse, logits.logsumexp(0), rtol=0, atol=1e-6)


def test_lse_goes_on_from_tile_to_tile(library):
    # Catches: tiles that replace the running values.
    products = products_of(40, 30)
    rows, columns = (torch.full((n,), -math.inf, dtype=torch.float64) for n in products.shape)
    for top, bottom, left, right in [(0, 33, 0, 11), (33, 40, 0, 11), (0, 33, 11, 30), (33, 40, 11, 30)]:
        tile = Kernels(library, products[top:bottom, left:right])
        rows[top:bottom], columns[left:right] = tile.lse(30.0, 1.0, (rows[top:bottom], columns[left:right]))
    logits = logits_of(products, 30.0)
    torch.testing.assert_close(rows, logits.logsumexp(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(columns, logits.logsumexp(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows, columns, own", [(70, 1030, 0), (70, 1030, -9), (20, 30, 5)])
@pytest.mark.parametrize("scale, lower", [(60.0, 0.0), (300.0, 1.0)])  # 1: about the maximum
def test_lse_keeps_what_others_add_to_an_own_pair(library, rows, columns, own, scale, lower):
    # Catches: own pairs in the float32 sum, where 1e-8 beside 1 is rounded away; lost ones; a wrong row's.
    products = 0.1 * products_of(rows, columns, own)
    mine = is_own(products, own)
    products[mine] += 18 / scale
    products -= lower
    row_lse, column_lse = Kernels(library, products, own).lse(scale)
    logits = logits_of(products, scale)
    for k, lse in ((1, row_lse), (0, column_lse)):
        at = mine.any(k)
        others = torch.where(mine, -math.inf, logits).logsumexp(k)
        pair = torch.where(mine, logits, -math.inf).amax(k)
        # log(1 + exp(others - pair)), as lse is a float64, to 1e-14
        truth = F.softplus(others - pair, threshold=100)[at]
        torch.testing.assert_close((lse - pair)[at], truth, rtol=1e-5, atol=1e-13)
        torch.testing.assert_close(lse[~at], others[~at], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_own_products(library, dtype):
    # Catches: a stride taken for another, a lost remainder of the width, sums in 16 bits, a row too many.
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(21, 83, generator=generator).to(dtype) for _ in range(2))
    for one, other in ((image, text), (image.T.contiguous().T, text[:, ::2].repeat_interleave(2, 1)[:, :83])):
        own = torch.full((22,), 7.0)
        places = [number for x in (one, other) for number in (x.data_ptr(), *x.stride())]
        failure = library.own_products(*places, *one.shape, DTYPES[dtype], own.data_ptr())
        assert failure is None, failure
        terms = one.double() * other.double()
        assert bool(((own[:21] - terms.sum(1)).abs() <= 3e-7 * terms.abs().sum(1)).all()) and own[21] == 7
    assert b"float16 or bfloat16" in library.own_products(*places, 21, 83, 0, own.data_ptr())


@pytest.mark.parametrize("rows, columns", [(1, 1), (35, 7), (34, 1027)])
@pytest.mark.parametrize("kind", ["low cosines", "a low row", "a low column", "huge", "far apart"])
def test_lse_about_the_maximum(library, kind, rows, columns):
    # Catches: sums of exp(L - shift) that underflow or overflow, in one place or everywhere.
    products = products_of(rows, columns)
    if kind == "low cosines":
        products = -0.6 - 0.4 * products.abs()
    elif kind == "a low row":
        products[-1] = -1.0
    elif kind == "a low column":
        products[:, -1] = -0.9
    elif kind == "huge":
        products = 900 * products
    elif kind == "far apart":
        products[: rows // 2] -= 70
        products[:, columns // 2 :] -= 300
    row_lse, column_lse = Kernels(library, products).lse(100.0)
    logits = logits_of(products, 100.0)
    for actual, expected in ((row_lse, logits.logsumexp(1)), (column_lse, logits.logsumexp(0))):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_lse_is_not_finite_where_logits_are_not(library, value):
    # Catches: a maximum that drops NaN; finite rows that suffer from others.
    products = products_of(35, 1026)
    products[3] = value
    row_lse, column_lse = Kernels(library, products).lse(50.0)
    logits = logits_of(products, 50.0)
    others = torch.arange(35) != 3
    assert not bool(row_lse[3].isfinite())
    torch.testing.assert_close(row_lse[others], logits.logsumexp(1)[others], rtol=0, atol=1e-6)
    if value == -math.inf:  # a weight of zero
        torch.testing.assert_close(column_lse, logits.logsumexp(0), rtol=0, atol=1e-6)
    else:
        assert not bool(column_lse.isfinite().any())


# -------------------------------------------------------------------------------------------------- gradients

SMALL = [(1, 1, 0), (3, 5, 0)]
ROUNDING = {torch.float32: 1e-5, torch.float16: 1.01 * 2**-11, torch.bfloat16: 1.01 * 2**-8}


@pytest.mark.parametrize("rows, columns, own", [*SMALL, (32, 1024, 2000), (40, 1030, -9), (33, 1025, 1020)])
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 4.0), *((dtype, 100.0) for dtype in DTYPES)])
def test_gradient(library, rows, columns, own, dtype, scale):
    # Catches: a wrong own pair, one direction only, edges of blocks, exp(x) - 1 as a difference.
    products = products_of(rows, columns, own)
    logits = logits_of(products, scale)
    row_lse, column_lse = logits.logsumexp(1), logits.logsumexp(0)
    along, down = logits - row_lse[:, None], logits - column_lse
    expected = 0.5 * along.exp() + down.exp()
    expected = torch.where(is_own(products, own), 0.5 * along.expm1() + down.expm1(), expected)
    arguments = (torch.tensor(scale), row_lse, column_lse, 0.5, 1.0)
    gradient, sums = Kernels(library, products, own).epilogue("gradient", dtype, 1, *arguments)
    assert gradient.dtype == dtype
    least = 2**-25 if dtype == torch.float16 else 1e-37
    torch.testing.assert_close(gradient.double(), expected, rtol=ROUNDING[dtype] + 1e-5, atol=least)
    assert_sums(sums, [expected * products.double()])


def test_gradient_in_place(library):
    # Catches: a product that is overwritten before it is read.
    products = products_of(70, 1030)
    logits = logits_of(products, 20.0)
    arguments = (torch.tensor(20.0), logits.logsumexp(1), logits.logsumexp(0), 1.0, 1.0)
    kernels = Kernels(library, products)
    apart, sums = kernels.epilogue("gradient", torch.float32, 1, *arguments)
    in_place, sums_in_place = kernels.epilogue("in place", torch.float32, 1, *arguments)
    assert torch.equal(apart, in_place) and torch.equal(sums, sums_in_place)


def test_gradient_is_not_finite_where_an_lse_is_not(library):
    # Catches: exp(L - infinity) = 0, which would make a wrong gradient look right.
    products = products_of(5, 9)
    row_lse, column_lse = torch.zeros(5, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    row_lse[2], column_lse[4] = math.inf, math.nan
    arguments = (torch.tensor(1.0), row_lse, column_lse, 1.0, 1.0)
    gradient, _ = Kernels(library, products).epilogue("gradient", torch.float32, 1, *arguments)
    assert not bool(gradient[2].isfinite().any() or gradient[:, 4].isfinite().any())


def test_gradient_must_have_a_place(library):
    # Catches: a null pointer that reaches the device.
    products = torch.zeros(8)
    shape = Shape(products.data_ptr(), 8, 1, 1, 0)
    workspace = torch.zeros(library.workspace_bytes(1, 1), dtype=torch.uint8)
    nowhere = Target(None, 8, 0, None, workspace.data_ptr())
    number = torch.zeros(1, dtype=torch.float64)
    failure = library.gradient(shape, *[number.data_ptr()] * 3, 1.0, 1.0, nowhere)
    assert b"expected a gradient" in failure


@pytest.mark.parametrize("rows, columns, own", [*SMALL, (32, 1024, -40), (40, 1030, -9), (33, 1025, 1020)])
@pytest.mark.parametrize("dtype, scale, bias", [(torch.float32, 100.0, 3.0), (None, 100.0, 3.0),
                                                *((dtype, 10.0, -10.0) for dtype in DTYPES)])  # fmt: skip
def test_sigmoid(library, rows, columns, own, dtype, scale, bias):
    # Catches: a wrong sign, overflow, log(1 + u) of small u (most of the loss, at a bias of -10), lost sums.
    products = products_of(rows, columns, own)
    signs = torch.where(is_own(products, own), 1.0, -1.0).double()
    y = -signs * (scale * products.double() + bias)
    expected = -signs * y.sigmoid()
    arguments = (torch.tensor(scale), torch.tensor(bias))
    gradient, sums = Kernels(library, products, own).epilogue("sigmoid", dtype, 3, *arguments)
    if dtype is not None:
        least = 2**-25 if dtype == torch.float16 else 1e-37
        torch.testing.assert_close(gradient.double(), expected, rtol=ROUNDING[dtype] + 1e-5, atol=least)
    assert_sums(sums, [F.softplus(y, threshold=100), expected * products, expected][: len(sums)])


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 5), (32, 1024), (33, 1030)])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_soft(library, rows, columns, dtype, scale=40.0):
    # Catches: rows for columns, targets' scale without the half, a wrong stride of the second matrix.
    products, alike = products_of(rows, columns), 2 * products_of(rows, columns, 1)
    logits, targets = logits_of(products, scale), logits_of(alike, scale / 2)
    lse = [value.logsumexp(k) for value in (logits, targets) for k in (1, 0)]
    along, down = logits - lse[0][:, None], logits - lse[1]
    p, q = (targets - lse[2][:, None]).exp(), (targets - lse[3]).exp()
    expected = along.exp() + down.exp() - p - q
    kernels = Kernels(library, products)
    arguments = (kernels.padded(alike), torch.tensor(scale), *lse)
    gradient, sums = kernels.epilogue("soft", dtype, 2, *arguments)
    size = along.exp() + down.exp() + p + q
    if dtype is not None:
        wrong = (gradient.double() - expected).abs() > ROUNDING[dtype] * expected.abs() + 4e-6 * size + 2**-25
        assert not bool(wrong.any())
    loss = -(p * along + q * down)
    assert_sums(sums, [loss, expected * products][: len(sums)], [loss, size * products][: len(sums)])
