"""The interpreter's bfloat16, which it gets wrong by itself."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def interpreted(kernel_device):
    if kernel_device != "cpu":
        pytest.skip("there is a GPU: nothing is interpreted")


def test_conversions_round_to_nearest_even():
    from tests.support.interpreter_bf16 import narrow, widen

    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator)
    special = torch.tensor([0.0, -0.0, torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])
    values = torch.cat([bits.int().view(torch.float32), special])
    actual = torch.from_numpy(widen(narrow(values.numpy())))
    torch.testing.assert_close(actual, values.bfloat16().float(), atol=0, rtol=0, equal_nan=True)


def test_a_kernel_loads_computes_and_stores_bfloat16():
    from tests.support.aot.toys import add_kernel

    x, y = torch.randn(2, 100).bfloat16()
    out = torch.empty(100, dtype=torch.bfloat16)
    add_kernel[(1,)](x, y, out, 100, 0.3, BLOCK=128)
    scale = torch.tensor(0.3)
    assert torch.equal(out, (x.float() + y.float() * scale).bfloat16())


def test_products_of_bfloat16():
    from tests.support.aot.toys import matmul_kernel

    x, y = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    matmul_kernel[(1,)](x, y, out, M=16, N=16, K=16)
    torch.testing.assert_close(out, x.float() @ y.float())


def test_arithmetic_in_bfloat16_raises():
    from tests.support.aot.toys import bfloat16_sum_kernel

    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="on bfloat16 in the interpreter: convert to float32"):
        bfloat16_sum_kernel[(1,)](x, torch.empty_like(x), BLOCK=16)
