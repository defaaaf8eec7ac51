"""csrc/cuda/contrastive.cu without a GPU: the gradients of the logits, and the losses computed with them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.native.emulated_cuda import (
    DTYPES,
    Kernels,
    Shape,
    Target,
    assert_sums,
    is_positive,
    logits_of,
    products_of,
)

SMALL = [(1, 1, 0), (3, 5, 0)]
ROUNDING = {torch.float32: 1e-5, torch.float16: 1.01 * 2**-11, torch.bfloat16: 1.01 * 2**-8}


@pytest.mark.parametrize(
    "rows, columns, diagonal_offset", [*SMALL, (32, 1024, 2000), (40, 1030, -9), (33, 1025, 1020)]
)
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 4.0), *((dtype, 100.0) for dtype in DTYPES)])
def test_gradient(emulated_cuda, rows, columns, diagonal_offset, dtype, scale):
    # Catches: a wrong positive, one direction only, edges of blocks, exp(x) - 1 as a difference.
    products = products_of(rows, columns, diagonal_offset)
    logits = logits_of(products, scale)
    row_lse, column_lse = logits.logsumexp(1), logits.logsumexp(0)
    row_log_p, column_log_p = logits - row_lse[:, None], logits - column_lse
    negative = 0.5 * row_log_p.exp() + column_log_p.exp()
    positive = 0.5 * row_log_p.expm1() + column_log_p.expm1()
    expected = torch.where(is_positive(products, diagonal_offset), positive, negative)
    arguments = (torch.tensor(scale), row_lse, column_lse, 0.5, 1.0)
    kernels = Kernels(emulated_cuda, products, diagonal_offset)
    gradient, sums = kernels.epilogue("gradient", dtype, 1, *arguments)
    assert gradient.dtype == dtype
    least = 2**-25 if dtype == torch.float16 else 1e-37
    torch.testing.assert_close(gradient.double(), expected, rtol=ROUNDING[dtype] + 1e-5, atol=least)
    assert_sums(sums, [expected * products.double()])


def test_gradient_in_place(emulated_cuda):
    # Catches: a product that is overwritten before it is read.
    products = products_of(70, 1030)
    logits = logits_of(products, 20.0)
    arguments = (torch.tensor(20.0), logits.logsumexp(1), logits.logsumexp(0), 1.0, 1.0)
    kernels = Kernels(emulated_cuda, products)
    apart, sums = kernels.epilogue("gradient", torch.float32, 1, *arguments)
    in_place, sums_in_place = kernels.epilogue("in place", torch.float32, 1, *arguments)
    assert torch.equal(apart, in_place) and torch.equal(sums, sums_in_place)


def test_gradient_is_not_finite_where_an_lse_is_not(emulated_cuda):
    # Catches: exp(L - infinity) = 0, which would make a wrong gradient look right.
    products = products_of(5, 9)
    row_lse, column_lse = torch.zeros(5, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    row_lse[2], column_lse[4] = math.inf, math.nan
    arguments = (torch.tensor(1.0), row_lse, column_lse, 1.0, 1.0)
    gradient, _ = Kernels(emulated_cuda, products).epilogue("gradient", torch.float32, 1, *arguments)
    assert not bool(gradient[2].isfinite().any() or gradient[:, 4].isfinite().any())


def test_gradient_must_have_an_address(emulated_cuda):
    # Catches: a null pointer that reaches the device.
    products = torch.zeros(8)
    shape = Shape(products.data_ptr(), 8, 1, 1, 0)
    workspace = torch.zeros(emulated_cuda.workspace_bytes(1, 1), dtype=torch.uint8)
    nowhere = Target(None, 8, 0, None, workspace.data_ptr())
    number = torch.zeros(1, dtype=torch.float64)
    failure = emulated_cuda.gradient(shape, *[number.data_ptr()] * 3, 1.0, 1.0, nowhere)
    assert b"expected a gradient" in failure


@pytest.mark.parametrize(
    "rows, columns, diagonal_offset", [*SMALL, (32, 1024, -40), (40, 1030, -9), (33, 1025, 1020)]
)
@pytest.mark.parametrize("dtype, scale, bias", [(torch.float32, 100.0, 3.0), (None, 100.0, 3.0),
                                                *((dtype, 10.0, -10.0) for dtype in DTYPES)])  # fmt: skip
def test_sigmoid(emulated_cuda, rows, columns, diagonal_offset, dtype, scale, bias):
    # Catches: a wrong sign, overflow, log(1 + u) of small u (most of the loss, at a bias of -10), lost sums.
    products = products_of(rows, columns, diagonal_offset)
    signs = torch.where(is_positive(products, diagonal_offset), 1.0, -1.0).double()
    y = -signs * (scale * products.double() + bias)
    expected = -signs * y.sigmoid()
    arguments = (torch.tensor(scale), torch.tensor(bias))
    kernels = Kernels(emulated_cuda, products, diagonal_offset)
    gradient, sums = kernels.epilogue("sigmoid", dtype, 3, *arguments)
    if dtype is not None:
        least = 2**-25 if dtype == torch.float16 else 1e-37
        torch.testing.assert_close(gradient.double(), expected, rtol=ROUNDING[dtype] + 1e-5, atol=least)
    assert_sums(sums, [F.softplus(y, threshold=100), expected * products, expected][: len(sums)])


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 5), (32, 1024), (33, 1030)])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_soft(emulated_cuda, rows, columns, dtype, scale=40.0):
    # Catches: rows for columns, a scale of the targets without the half, a wrong stride of the second matrix.
    products, similarity = products_of(rows, columns), 2 * products_of(rows, columns, 1)
    logits, targets = logits_of(products, scale), logits_of(similarity, scale / 2)
    lse = [value.logsumexp(k) for value in (logits, targets) for k in (1, 0)]
    row_log_p, column_log_p = logits - lse[0][:, None], logits - lse[1]
    p, q = (targets - lse[2][:, None]).exp(), (targets - lse[3]).exp()
    expected = row_log_p.exp() + column_log_p.exp() - p - q
    kernels = Kernels(emulated_cuda, products)
    arguments = (kernels.padded(similarity), torch.tensor(scale), *lse)
    gradient, sums = kernels.epilogue("soft", dtype, 2, *arguments)
    size = row_log_p.exp() + column_log_p.exp() + p + q
    if dtype is not None:
        wrong = (gradient.double() - expected).abs() > ROUNDING[dtype] * expected.abs() + 4e-6 * size + 2**-25
        assert not bool(wrong.any())
    loss = -(p * row_log_p + q * column_log_p)
    assert_sums(sums, [loss, expected * products][: len(sums)], [loss, size * products][: len(sums)])
