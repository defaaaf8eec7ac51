"""What callers of the fused contrastive losses may rely on: equal bits, any layout, autocast, compilation."""

from __future__ import annotations

import math

import pytest
import torch

from dalle2_fast import functional
from tests.support.losses.fused_cases import LOSSES, each_loss, features, fused, inputs_of
from tests.support.truth import outputs_and_gradients

_C = pytest.importorskip("dalle2_fast._C")

import dalle2_fast.kernels.contrastive.clip  # noqa: E402
import dalle2_fast.kernels.contrastive.sigmoid  # noqa: E402
import dalle2_fast.kernels.contrastive.soft  # noqa: E402, F401
from dalle2_fast.kernels.contrastive._tiles import empty_matrix, tile_arguments  # noqa: E402

OPS = torch.ops.dalle2_fast


@each_loss
def test_equal_calls_give_equal_bits(name):
    inputs = {key: value.float() for key, value in inputs_of(name, 300, 24).items()}
    first = outputs_and_gradients(fused(name), inputs, torch.float32)
    for _ in range(3):
        again = outputs_and_gradients(fused(name), inputs, torch.float32)
        assert all(torch.equal(first[key], again[key]) for key in first)


def epilogues(products, threads):
    """The results of all four on a tile of these products, as one list of tensors."""
    rows, columns = products.shape
    row_lse, column_lse = (torch.full((size,), -math.inf, dtype=torch.float64) for size in (rows, columns))
    code = _C.DTYPES[str(products.dtype).removeprefix("torch.")]
    results = [row_lse, column_lse]

    def run(epilogue, *arguments):
        tile = empty_matrix((rows, columns), products.dtype, products.device)
        tile.copy_(products)
        value = epilogue(*tile_arguments(tile, 3), *arguments, threads)
        results.extend([tile, torch.tensor(value if value is not None else 0.0, dtype=torch.float64)])

    lse = row_lse.data_ptr(), column_lse.data_ptr()
    run(_C.cpu.lse_epilogue, code, 30.0, *lse)
    run(_C.cpu.gradient_epilogue, code, 30.0, *lse, 1.0, 0.5)
    run(_C.cpu.sigmoid_epilogue, code, 30.0, -2.0, True)
    similarity = empty_matrix((rows, columns), products.dtype, products.device).copy_(products.flip(0))
    run(_C.cpu.soft_epilogue, similarity.data_ptr(), code, 30.0, *lse, *lse, True)
    return results


def test_threads_change_nothing():
    products = torch.rand(257, 2600, generator=torch.Generator().manual_seed(0)) * 2 - 1
    products[::7] -= 8  # rows whose sums are out of range
    expected = epilogues(products, 1)
    for threads in (2, 3, 8):
        for one, other in zip(epilogues(products, threads), expected, strict=True):
            assert torch.equal(one, other)


def test_nothing_is_written_outside_the_columns():
    tile = torch.full((3, 16), math.nan)
    tile[:, :11] = 0.5
    row_lse, column_lse = (torch.full((size,), -math.inf, dtype=torch.float64) for size in (3, 13))
    arguments = tile_arguments(tile[:, :11], 0)
    _C.cpu.lse_epilogue(*arguments, 0, 2.0, row_lse.data_ptr(), column_lse.data_ptr(), 1)
    torch.testing.assert_close(row_lse, torch.full((3,), math.log(11) + 1, dtype=torch.float64))
    assert column_lse[11:].isinf().all()
    _C.cpu.sigmoid_epilogue(*arguments, 0, 2.0, 0.0, True, 1)
    assert tile[:, :11].isfinite().all() and tile[:, 11:].isnan().all()


@each_loss
def test_rows_of_any_stride_and_mixed_dtypes(name):
    inputs = {key: value.float() for key, value in inputs_of(name, 30, 12).items()}
    expected = fused(name)(**inputs)
    for lay_out in (lambda x: x.T.contiguous().T, lambda x: torch.cat([x, x], 1)[:, :12],
                    lambda x: torch.stack([x, x], 2)[..., 0]):  # fmt: skip
        strided = inputs | {key: lay_out(inputs[key]) for key in ("image_features", "text_features")}
        torch.testing.assert_close(fused(name)(**strided), expected)
    rounded = inputs["text_features"].bfloat16()
    mixed = fused(name)(**(inputs | {"text_features": rounded}))
    torch.testing.assert_close(mixed, fused(name)(**(inputs | {"text_features": rounded.float()})))
    numbers = {key: float(inputs[key]) for key in LOSSES[name]}
    torch.testing.assert_close(fused(name)(**(inputs | numbers)), expected)


@each_loss
def test_autocast_changes_nothing(name):
    inputs = {key: value.float().requires_grad_() for key, value in inputs_of(name, 20, 12).items()}
    expected = torch.autograd.grad(fused(name)(**inputs), list(inputs.values()))
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(fused(name)(**inputs), list(inputs.values()))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_a_bias_cancels_but_has_a_gradient():
    inputs = inputs_of("contrastive_loss", 9, 4)
    bias = torch.tensor([2.5], requires_grad=True)
    loss = fused("contrastive_loss")(**inputs, logit_bias=bias)
    assert loss == fused("contrastive_loss")(**inputs)
    assert torch.equal(torch.autograd.grad(loss, bias)[0], torch.zeros(1))


def test_auto_takes_the_reference_for_few_logits(monkeypatch):
    called = []
    reference = "dalle2_fast.ops.contrastive_loss.contrastive_loss_reference"
    monkeypatch.setattr(reference, lambda *arguments: called.append(1))
    few, many = torch.eye(4), torch.eye(2048, 2)
    functional.contrastive_loss(few, few, 1.0)
    assert called == [1]
    functional.contrastive_loss(many, many, 1.0)
    assert called == [1]


# ---------------------------------------------------------------------------------------------- registration


def op_calls(device="cpu"):
    image, text = (x.float().to(device).requires_grad_() for x in features(5, 3))
    scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (4.0, -2.0))
    plain_image, plain_text, plain_scale = (x.detach() for x in (image, text, scale))
    rows = torch.ones(5, dtype=torch.float64, device=device)
    return {
        OPS.contrastive_loss: (image, text, scale),
        OPS.sigmoid_loss: (image, text, scale, bias, 0, False),
        OPS.soft_contrastive_loss: (image, text, scale),
        OPS.contrastive_lse: (plain_image, plain_text, plain_scale, 0),
        OPS.contrastive_gradient: (
            plain_image, plain_text, plain_scale, rows, rows, 0, 0.1, 0.1, plain_scale
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", list(op_calls()), ids=str)
def test_opcheck(op):
    """Fails on a wrong schema, a fake that lies about shape or strides, or an untraceable gradient."""
    torch.library.opcheck(op.default, op_calls()[op])


@each_loss
def test_compiles_into_one_graph(name):
    inputs = {key: value.float().requires_grad_() for key, value in inputs_of(name, 20, 6).items()}
    compiled = torch.compile(lambda **kw: fused(name)(**kw) * 2, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(**inputs), list(inputs.values()))
    expected = torch.autograd.grad(fused(name)(**inputs) * 2, list(inputs.values()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
