"""The contrastive losses against textbook formulas in float64, with gradients and adversarial features."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast import functional
from tests.support.truth import assert_close_to_truth, outputs_and_gradients


def infonce(image_features, text_features, logit_scale, logit_bias=None):
    logits = logit_scale * image_features @ text_features.T
    logits = logits if logit_bias is None else logits + logit_bias
    return ((logits.logsumexp(0) + logits.logsumexp(1)) / 2 - logits.diagonal()).mean()


def sigmoid(image_features, text_features, logit_scale, logit_bias):
    logits = logit_scale * image_features @ text_features.T + logit_bias
    signed = torch.where(torch.eye(len(logits), dtype=torch.bool), -logits, logits)
    return torch.logaddexp(signed, torch.zeros_like(signed)).sum() / len(logits)


def soft(image_features, text_features, logit_scale):
    logits = logit_scale * image_features @ text_features.T
    similarity = (image_features @ image_features.T + text_features @ text_features.T) / 2
    targets = (logit_scale * similarity).softmax(-1).detach()
    cross = targets * (logits.logsumexp(1, keepdim=True) - logits + logits.logsumexp(0)[:, None] - logits.T)
    return cross.sum() / 2 / len(logits)


LOSSES = [
    (functional.contrastive_loss, infonce, ("logit_scale",)),
    (functional.contrastive_loss, infonce, ("logit_scale", "logit_bias")),
    (functional.sigmoid_loss, sigmoid, ("logit_scale", "logit_bias")),
    (functional.soft_contrastive_loss, soft, ("logit_scale",)),
]


def features(n, d, kind="unit"):
    generator = torch.Generator().manual_seed(n + d)
    image, text = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "unit":
        image, text = F.normalize(image, dim=-1), F.normalize(0.4 * image + text, dim=-1)
    elif kind == "equal":
        image = text = F.normalize(image[:1], dim=-1).expand(n, d).clone()
    elif kind == "opposite":
        image = F.normalize(image, dim=-1)
        text = -image
    elif kind == "huge":
        image, text = 300 * image, 300 * text
    return {"image_features": image, "text_features": text}


def make(n, d, kind, extra, scale):
    scalars = {"logit_scale": torch.tensor(scale), "logit_bias": torch.tensor(-3.0)}
    return features(n, d, kind) | {name: scalars[name] for name in extra}


@pytest.mark.parametrize("n, d, kind, scale", [
    (1, 3, "unit", 1.0), (7, 5, "unit", 14.3), (33, 17, "unit", 100.0),
    (6, 4, "equal", 100.0), (6, 4, "opposite", 100.0), (5, 3, "huge", 100.0),
])  # fmt: skip
@pytest.mark.parametrize("ours, textbook, extra", LOSSES)
def test_equals_formula_in_float64(ours, textbook, extra, n, d, kind, scale):
    # Catches: one direction only, a mean for a sum, overflow of exp, gradient through the soft targets.
    inputs = make(n, d, kind, extra, scale)
    actual = outputs_and_gradients(ours, inputs, torch.float64)
    expected = outputs_and_gradients(textbook, inputs, torch.float64)
    assert actual.keys() == expected.keys()
    for name in expected:
        atol = 1e-11 + 1e-13 * float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=atol, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ours, textbook, extra", LOSSES)
def test_is_close_to_truth(ours, textbook, extra, dtype):
    inputs = make(33, 17, "unit", extra, 20.0)
    inputs = {name: value.to(dtype).double() for name, value in inputs.items()}
    truth = outputs_and_gradients(textbook, inputs, torch.float64)
    plain = outputs_and_gradients(textbook, inputs, dtype)
    actual = outputs_and_gradients(ours, inputs, dtype)
    if ours is functional.contrastive_loss and extra != ("logit_scale",):
        # A bias cancels; what is left of its gradient is rounding, and has no size to compare with.
        for results in (truth, plain):
            results.pop("d logit_bias")
        assert actual.pop("d logit_bias").abs() < 1e-6
    assert_close_to_truth(actual, plain, truth, slack=1e-5)
    assert actual["output"].dtype == torch.float32


@pytest.mark.parametrize("ours, textbook, extra", LOSSES)
def test_autocast_changes_nothing(ours, textbook, extra):
    inputs = {name: value.float() for name, value in make(9, 8, "unit", extra, 50.0).items()}
    expected = ours(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(**inputs), expected)


@pytest.mark.parametrize("ours, textbook, extra", LOSSES)
def test_numbers_stand_for_scalar_tensors_and_rows_may_be_strided(ours, textbook, extra):
    inputs = make(6, 8, "unit", extra, 10.0)
    numbers = {name: float(inputs[name]) for name in extra}
    strided = {name: inputs[name].T.contiguous().T for name in ("image_features", "text_features")}
    torch.testing.assert_close(ours(**strided, **numbers), ours(**inputs))


def test_known_values():
    same = torch.ones(8, 4)  # all equal: a choice among 8
    assert math.isclose(functional.contrastive_loss(same, same, 3.0).item(), math.log(8), rel_tol=1e-6)
    assert math.isclose(functional.soft_contrastive_loss(same, same, 3.0).item(), math.log(8), rel_tol=1e-6)
    axes = torch.eye(4)  # every logit is 0: log 2 per pair
    assert math.isclose(functional.sigmoid_loss(axes, axes, 0.0, 0.0).item(), 4 * math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize("ours, textbook, extra", LOSSES)
def test_non_finite_features_never_give_a_finite_loss(ours, textbook, extra):
    for bad in (math.nan, math.inf):
        inputs = make(5, 4, "unit", extra, 10.0)
        inputs["text_features"][2, 1] = bad
        assert not bool(ours(**inputs).isfinite())


FEW = torch.zeros(4, 3)


@pytest.mark.parametrize("loss", [functional.contrastive_loss, functional.sigmoid_loss,
                                  functional.soft_contrastive_loss])  # fmt: skip
@pytest.mark.parametrize(
    "kind, message, image, text, scale",
    [
        (ValueError, r"text_features: expected \[N, D\] = \(4, 3\), got \(1, 3\)", FEW, FEW[:1], 1.0),
        (ValueError, r"text_features: expected \[N, D\] = \(4, 3\), got \(4, 2\)", FEW, FEW[:, :2], 1.0),
        (TypeError, "image_features: expected a floating-point tensor, got .*int64", FEW.long(), FEW, 1.0),
        (ValueError, r"image_features: expected \[N, D\], .* got \(0, 3\)", FEW[:0], FEW[:0], 1.0),
        (ValueError, r"image_features: expected \[N, D\], .* got \(3,\)", FEW[0], FEW[0], 1.0),
        (ValueError, "text_features: expected device cpu", FEW, FEW.to("meta"), 1.0),
        (ValueError, r"logit_scale: expected a scalar, got \(4,\)", FEW, FEW, torch.ones(4)),
        (ValueError, "logit_scale: expected a finite number, got inf", FEW, FEW, math.inf),
        (TypeError, "logit_scale: expected a number or a scalar tensor, got None", FEW, FEW, None),
    ],
)
def test_errors_name_argument_expected_and_got(loss, kind, message, image, text, scale):
    extra = (0.0,) if loss is functional.sigmoid_loss else ()
    with pytest.raises(kind, match=message):
        loss(image, text, scale, *extra)


def test_sigmoid_loss_needs_a_bias():
    with pytest.raises(TypeError, match="logit_bias: expected a number or a scalar tensor, got None"):
        functional.sigmoid_loss(FEW, FEW, 1.0, None)
