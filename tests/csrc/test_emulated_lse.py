"""csrc/cuda/contrastive.cu without a GPU: the emulator, log-sum-exps and products of positive pairs.

The unmodified file, launches included, runs on the CPU (cuda_on_cpu/) and is compared with float64. The
emulator does not model real races or the rounding of the fast intrinsics.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.native.emulated_cuda import DTYPES, Kernels, is_positive, logits_of, products_of

# Less than a block, exactly one block, one more than a block in both directions; odd everywhere.
SIZES = [(1, 1), (3, 5), (64, 1024), (65, 1025), (97, 1030)]


# --------------------------------------------------------------------------------------------------- emulator


def test_emulator_notices_faults(emulated_cuda):
    # Catches: an emulator that lets a faulty kernel pass.
    for barrier in (True, False):
        for descending in (True, False):
            emulated_cuda.set_descending(descending)
            before = torch.rand(64)  # new values each time: shared memory keeps those of the last call
            values = before.clone()
            assert emulated_cuda.run_reverse(barrier, values.data_ptr()) is None
            assert torch.equal(values, before.flip(0)) == barrier
    assert b"deadlock" in emulated_cuda.run_wait_in_half()
    assert b"misaligned" in emulated_cuda.run_load_misaligned(torch.zeros(16).data_ptr())


# ------------------------------------------------------------------------------------------------ log-sum-exp


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("scale, factor", [(1.0, 1.0), (100.0, 1.0), (-28.4, 0.5)])
def test_lse(emulated_cuda, rows, columns, scale, factor):
    # Catches: edges of blocks, a lost row or column, the shift, float32 where an easy pair needs more.
    products = products_of(rows, columns)
    row_lse, column_lse = Kernels(emulated_cuda, products).lse(scale, factor)
    logits = logits_of(products, factor * scale)
    torch.testing.assert_close(row_lse, logits.logsumexp(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(column_lse, logits.logsumexp(0), rtol=0, atol=1e-6)


def test_lse_goes_on_from_tile_to_tile(emulated_cuda):
    # Catches: tiles that replace the running values.
    products = products_of(40, 30)
    rows, columns = (torch.full((n,), -math.inf, dtype=torch.float64) for n in products.shape)
    for top, bottom, left, right in [(0, 33, 0, 11), (33, 40, 0, 11), (0, 33, 11, 30), (33, 40, 11, 30)]:
        tile = Kernels(emulated_cuda, products[top:bottom, left:right])
        rows[top:bottom], columns[left:right] = tile.lse(30.0, 1.0, (rows[top:bottom], columns[left:right]))
    logits = logits_of(products, 30.0)
    torch.testing.assert_close(rows, logits.logsumexp(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(columns, logits.logsumexp(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows, columns, diagonal_offset", [(70, 1030, 0), (70, 1030, -9), (20, 30, 5)])
@pytest.mark.parametrize("scale, lower", [(60.0, 0.0), (300.0, 1.0)])  # 1: about the maximum
def test_lse_keeps_what_negatives_add_to_a_positive(
    emulated_cuda, rows, columns, diagonal_offset, scale, lower
):
    # Catches: positives in the float32 sum, where 1e-8 added to 1 is rounded away; lost ones; a wrong row's.
    products = 0.1 * products_of(rows, columns, diagonal_offset)
    positive = is_positive(products, diagonal_offset)
    products[positive] += 18 / scale
    products -= lower
    row_lse, column_lse = Kernels(emulated_cuda, products, diagonal_offset).lse(scale)
    logits = logits_of(products, scale)
    for k, lse in ((1, row_lse), (0, column_lse)):
        at = positive.any(k)
        negatives = torch.where(positive, -math.inf, logits).logsumexp(k)
        pair = torch.where(positive, logits, -math.inf).amax(k)
        # log(1 + exp(negatives - pair)), to 1e-14, because the lse is float64
        truth = F.softplus(negatives - pair, threshold=100)[at]
        torch.testing.assert_close((lse - pair)[at], truth, rtol=1e-5, atol=1e-13)
        torch.testing.assert_close(lse[~at], negatives[~at], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positive_products(emulated_cuda, dtype):
    # Catches: a stride taken for another, a lost remainder of the width, sums in 16 bits, a row too many.
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(21, 83, generator=generator).to(dtype) for _ in range(2))
    for one, other in ((image, text), (image.T.contiguous().T, text[:, ::2].repeat_interleave(2, 1)[:, :83])):
        positives = torch.full((22,), 7.0)
        features = [number for x in (one, other) for number in (x.data_ptr(), *x.stride())]
        failure = emulated_cuda.positive_products(*features, *one.shape, DTYPES[dtype], positives.data_ptr())
        assert failure is None, failure
        terms = one.double() * other.double()
        assert bool(((positives[:21] - terms.sum(1)).abs() <= 3e-7 * terms.abs().sum(1)).all())
        assert positives[21] == 7
    failure = emulated_cuda.positive_products(*features, 21, 83, 0, positives.data_ptr())
    assert b"float16 or bfloat16" in failure


@pytest.mark.parametrize("rows, columns", [(1, 1), (35, 7), (34, 1027)])
@pytest.mark.parametrize("kind", ["low cosines", "a low row", "a low column", "huge", "far apart"])
def test_lse_about_the_maximum(emulated_cuda, kind, rows, columns):
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
    row_lse, column_lse = Kernels(emulated_cuda, products).lse(100.0)
    logits = logits_of(products, 100.0)
    for actual, expected in ((row_lse, logits.logsumexp(1)), (column_lse, logits.logsumexp(0))):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_lse_is_not_finite_where_logits_are_not(emulated_cuda, value):
    # Catches: a maximum that drops NaN; a non-finite row that spoils others.
    products = products_of(35, 1026)
    products[3] = value
    row_lse, column_lse = Kernels(emulated_cuda, products).lse(50.0)
    logits = logits_of(products, 50.0)
    others = torch.arange(35) != 3
    assert not bool(row_lse[3].isfinite())
    torch.testing.assert_close(row_lse[others], logits.logsumexp(1)[others], rtol=0, atol=1e-6)
    if value == -math.inf:  # a weight of zero
        torch.testing.assert_close(column_lse, logits.logsumexp(0), rtol=0, atol=1e-6)
    else:
        assert not bool(column_lse.isfinite().any())
