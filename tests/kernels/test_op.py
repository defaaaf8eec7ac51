"""Registration of ops, on a toy op: y = scale * x^2, dy/dx = 2 * scale * x."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dalle2_fast.kernels._op import define, differentiate


@pytest.fixture(scope="module")
def square():
    op = define(
        "toy_square(Tensor x, float scale) -> Tensor",
        run=lambda x, scale: scale * x * x,
        fake=lambda x, scale: torch.empty_like(x),
    )
    op_backward = define(
        "toy_square_backward(Tensor grad, Tensor x, float scale) -> Tensor",
        run=lambda grad, x, scale: 2 * scale * grad * x,
        fake=lambda grad, x, scale: torch.empty_like(x),
    )

    def save(ctx, inputs, output) -> None:
        x, ctx.scale = inputs
        ctx.save_for_backward(x)

    def backward(ctx, grad):
        return op_backward(grad, *ctx.saved_tensors, ctx.scale), None

    differentiate(op, save=save, backward=backward)
    return op


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-2, 3, 10, dtype=torch.float64).reshape(5, 2).requires_grad_()


def test_value_gradient_and_inference_mode(square, x):
    torch.testing.assert_close(square(x, 3.0), 3 * x * x)
    torch.autograd.gradcheck(square, (x, 3.0))
    with torch.inference_mode():
        assert not square(x, 3.0).requires_grad


def test_the_op_is_reachable_by_name(square, x):
    assert torch.equal(torch.ops.dalle2_fast.toy_square(x, 2.0), square(x, 2.0))


def test_opcheck(square, x):
    """Fails on a wrong schema, a fake that lies about shape or strides, or an untraceable gradient."""
    torch.library.opcheck(square, (x, 3.0))


def test_compiles_into_one_graph(square, x):
    """fullgraph raises at a graph break; forward and backward go through the fakes."""
    compiled = torch.compile(lambda x: square(x, 3.0).sum(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(gradient, 6 * x.detach())


def test_runs_on_the_meta_device(square):
    assert square(torch.empty(4, 3, device="meta"), 1.0).shape == (4, 3)
