"""cross_attention against an explicit softmax in float64: masks, joint image keys, strides, gradients."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast import functional
from tests.support.truth import assert_close_to_truth, outputs_and_gradients

# B, H, T, S, T2 (0: no image keys), D
SHAPES = [(2, 3, 5, 7, 0, 4), (2, 2, 9, 4, 9, 8), (1, 1, 1, 1, 0, 1), (3, 2, 6, 5, 3, 5), (2, 1, 9, 77, 9, 8)]


def formula(q, context_k, context_v, context_mask=None, image_k=None, image_v=None, softmax_scale=None):
    k = context_k if image_k is None else torch.cat((context_k, image_k), 2)
    v = context_v if image_v is None else torch.cat((context_v, image_v), 2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    weights = (scale * (q @ k.transpose(2, 3))).exp()
    if context_mask is not None:
        count = context_mask.shape[1]
        context, image = weights[..., :count], weights[..., count:]
        weights = torch.cat((context * context_mask[:, None, None], image), -1)
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total == 0, torch.ones_like(total), total)) @ v


def make(b, h, t, s, t2, d, masked=False):
    torch.manual_seed(0)
    inputs = {name: torch.randn(b, h, n, d) for name, n in (("q", t), ("context_k", s), ("context_v", s))}
    if t2:
        inputs |= {"image_k": torch.randn(b, h, t2, d), "image_v": torch.randn(b, h, t2, d)}
    if masked:
        inputs["context_mask"] = torch.rand(b, s) < 0.6
        inputs["context_mask"][-1] = False  # a whole row without a context key
    return inputs


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_formula_in_float64(shape, masked, scale):
    # Catches: mask inverted or laid on the image keys, scale lost, NaN (value or gradient) in a masked row.
    inputs = make(*shape, masked=masked)
    actual = outputs_and_gradients(
        lambda **kw: functional.cross_attention(softmax_scale=scale, **kw), inputs, torch.float64
    )
    expected = outputs_and_gradients(lambda **kw: formula(softmax_scale=scale, **kw), inputs, torch.float64)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 17, 13, 0, 32), (2, 2, 16, 9, 16, 40)])
def test_is_close_to_truth(shape, dtype):
    inputs = make(*shape, masked=True)
    truth = outputs_and_gradients(formula, inputs, torch.float64)
    plain = outputs_and_gradients(formula, inputs, dtype)
    actual = outputs_and_gradients(functional.cross_attention, inputs, dtype)
    assert_close_to_truth(actual, plain, truth)
    assert actual["output"].dtype == dtype


def test_masked_rows_give_zeros_and_zero_gradients():
    inputs = make(2, 2, 5, 4, 0, 8, masked=True)
    results = outputs_and_gradients(functional.cross_attention, inputs, torch.float32)
    for name in ("output", "d q", "d context_k", "d context_v"):
        assert torch.count_nonzero(results[name][1]) == 0, name
        assert torch.count_nonzero(results[name][0]) > 0, name


def test_masked_keys_do_not_matter():
    # Catches: a large negative number in place of a mask; -1e4 + 1e6 would win.
    inputs = make(2, 2, 5, 6, 0, 8)
    mask = torch.tensor([[True] * 3 + [False] * 3] * 2)
    inputs["context_k"][:, :, 3:] = 1e6
    inputs["context_v"][:, :, 3:] = 1e6
    short = functional.cross_attention(
        inputs["q"], inputs["context_k"][:, :, :3], inputs["context_v"][:, :, :3]
    )
    torch.testing.assert_close(functional.cross_attention(**inputs, context_mask=mask), short)


@pytest.mark.parametrize("keys, image_keys", [(6, 0), (6, 3), (140, 0)])
def test_masked_keys_may_be_nan(keys, image_keys):
    # Catches: a weight of 0 times NaN, forward or backward; also in a row that may attend to no key.
    inputs = make(2, 1, 5, keys, image_keys, 8)
    mask = torch.arange(keys) < torch.tensor([[4], [0]])
    broken = dict(inputs)
    for name in ("context_k", "context_v"):
        broken[name] = inputs[name].masked_fill(~mask[:, None, :, None], float("nan"))

    def run(**tensors):
        return functional.cross_attention(**tensors, context_mask=mask, impl="reference")

    for dtype in (torch.float32, torch.float16):
        found, expected = (outputs_and_gradients(run, tensors, dtype) for tensors in (broken, inputs))
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_large_logits_do_not_overflow():
    q = 100 * torch.randn(1, 2, 8, 16)
    out = functional.cross_attention(q, q, torch.ones_like(q), softmax_scale=10.0)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_views_of_a_fused_projection():
    # Catches: a stride assumed. q, k, v are [B, H, T, D] views of one [B, T, 3, H, D] tensor.
    packed = torch.randn(2, 5, 3, 4, 8, dtype=torch.float64)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(functional.cross_attention(q, k, v), formula(q, k, v))


def test_rows_are_independent_of_the_batch():
    inputs = make(3, 2, 6, 5, 0, 8, masked=True)
    alone = {name: value[1:2] for name, value in inputs.items()}
    torch.testing.assert_close(
        functional.cross_attention(**inputs)[1:2], functional.cross_attention(**alone), rtol=1e-6, atol=1e-6
    )


def test_nothing_to_attend_to():
    q, none = torch.randn(2, 2, 3, 4), torch.zeros(2, 2, 0, 4)
    assert torch.count_nonzero(functional.cross_attention(q, none, none)) == 0
    torch.testing.assert_close(functional.cross_attention(q, none, none, image_k=q, image_v=q),
                               functional.cross_attention(q, q, q))  # fmt: skip
    assert functional.cross_attention(q[:0], q[:0], q[:0]).shape == (0, 2, 3, 4)
    assert functional.cross_attention(q[:, :, :0], q, q).shape == (2, 2, 0, 4)


def test_mixed_dtypes_meet_under_autocast():
    q = torch.randn(1, 2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = functional.cross_attention(q, q.bfloat16(), q.bfloat16())
    assert out.dtype == torch.bfloat16


Q = torch.zeros(2, 3, 4, 8)
MASK = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "kind, message, kwargs",
    [
        (ValueError, r"q: expected \[B, H, T, D\], got \(3, 4, 8\)", {"q": Q[0]}),
        (TypeError, "q: expected a floating-point tensor, got torch.int64", {"q": Q.long()}),
        (ValueError, r"context_k: expected \[B, H, S, D\] = \(2, 3, 4, 8\), got \(2, 3, 4, 7\)",
         {"context_k": Q[..., :7]}),
        (ValueError, r"context_v: expected \[B, H, S, D\] = \(2, 3, 4, 8\), got \(2, 3, 2, 8\)",
         {"context_v": Q[:, :, :2]}),
        (TypeError, r"context_v: expected torch.float32 \(that of q\), got torch.float64",
         {"context_v": Q.double()}),
        (ValueError, "context_k: expected device cpu", {"context_k": Q.to("meta")}),
        (TypeError, "context_mask: expected torch.bool .* got torch.float32", {"context_mask": MASK.float()}),
        (ValueError, r"context_mask: expected \[B, S\] = \(2, 4\), got \(2, 3\)",
         {"context_mask": MASK[:, :3]}),
        (ValueError, "image_v: expected a tensor because image_k is given, got None", {"image_k": Q}),
        (ValueError, "image_k: expected a tensor because image_v is given, got None", {"image_v": Q}),
        (ValueError, r"image_k: expected \[B, H, T2, D\] = \(2, 3, 4, 8\), got \(1, 3, 4, 8\)",
         {"image_k": Q[:1], "image_v": Q[:1]}),
        (ValueError, "softmax_scale: expected a finite number, got inf", {"softmax_scale": float("inf")}),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_got(kind, message, kwargs):
    with pytest.raises(kind, match=message):
        functional.cross_attention(**{"q": Q, "context_k": Q, "context_v": Q, **kwargs})
