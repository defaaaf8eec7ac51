"""The contrastive losses of dalle2_fast._C on the CPU against the references in float64.

`small_tiles` divides few rows into many tiles. The CUDA kernels run in tests/csrc.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.losses.fused_cases import LOSSES, compare, each_loss, features, fused, inputs_of, plain
from tests.support.truth import outputs_and_gradients

pytest.importorskip("dalle2_fast._C")

from dalle2_fast.kernels.contrastive._cpu import CpuBackend  # noqa: E402

OPS = torch.ops.dalle2_fast


@pytest.fixture
def small_tiles(monkeypatch):
    """64 rows by at most 64 columns, both of several slabs."""
    monkeypatch.setattr(CpuBackend, "max_columns", 64)
    monkeypatch.setattr(CpuBackend, "tile_bytes", 1)


# ------------------------------------------------------------------------------------------ against the truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, d, kind, scale", [
    (2, 1, "unit", 10.0), (7, 5, "unit", 1.0), (33, 17, "unit", 100.0), (601, 33, "unit", 14.3),
    (65, 64, "easy", 10.0), (40, 40, "opposite", 100.0), (40, 7, "far", 100.0),
    (50, 9, "mixed", 1.0), (50, 9, "mixed", 30.0),
])  # fmt: skip
@each_loss
def test_is_close_to_truth(name, n, d, kind, scale, dtype):
    # Catches: a wrong tail of a row, one direction only, sums out of range, p - 1 lost to a rounded lse.
    inputs = inputs_of(name, n, d, kind, scale, dtype)
    compare(name, inputs, dtype, slack=1e-5 if kind == "far" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_loss
def test_features_that_are_all_equal(name, dtype):
    """Nothing can be distinguished: gradients are 0 up to rounding, and have no size to be compared with."""
    inputs = inputs_of(name, 40, 7, "equal", 100.0, dtype)
    actual = {key: value.to(dtype) if value.dim() else value.float() for key, value in inputs.items()}
    actual = outputs_and_gradients(fused(name), actual, dtype, keep_dtype=LOSSES[name])
    torch.testing.assert_close(actual["output"].double(), plain(name)(**inputs), rtol=1e-6, atol=0)
    if name != "sigmoid_loss":
        assert all(value.abs().max() < 1e-4 for key, value in actual.items() if key != "output")


@pytest.mark.parametrize("kind, scale", [("unit", 100.0), ("mixed", 5.0), ("huge", 100.0)])
@each_loss
def test_float64(name, kind, scale):
    inputs = inputs_of(name, 37, 5, kind, scale)
    actual = outputs_and_gradients(fused(name), inputs, torch.float64)
    expected = outputs_and_gradients(plain(name), inputs, torch.float64)
    for key in expected:
        atol = 1e-12 * float(expected[key].abs().max())
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-9, atol=atol, msg=key)


@each_loss
def test_many_tiles(name, small_tiles):
    # Catches: positives of a tile at the wrong place, a column's sum from one tile only, gradients not added.
    for dtype in (torch.float32, torch.bfloat16):
        compare(name, inputs_of(name, 201, 19, "unit", 20.0, dtype), dtype)
        compare(name, inputs_of(name, 150, 19, "mixed", 3.0, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_pair(dtype):
    """A choice among one costs nothing; its gradient is 0. The logits are near 100: 4e-6 is rounding."""
    image, text = (x.to(dtype).requires_grad_() for x in features(1, 8, "easy"))
    for name in ("contrastive_loss", "soft_contrastive_loss"):
        loss = fused(name)(image_features=image, text_features=text, logit_scale=99.7)
        gradient, _ = torch.autograd.grad(loss, (image, text))
        assert abs(loss) < 1e-6 and gradient.abs().max() < 1e-4, (name, loss, gradient)


@each_loss
def test_gradcheck(name):
    inputs = {key: value.requires_grad_() for key, value in inputs_of(name, 5, 3, scale=4.0).items()}
    if name != "soft_contrastive_loss":  # its targets are held fixed, but finite differences move them
        assert torch.autograd.gradcheck(lambda *values: fused(name)(**dict(zip(inputs, values, strict=True))),
                                        tuple(inputs.values()))  # fmt: skip
        return
    image, text, scale = inputs.values()
    targets = (scale * (image @ image.T + text @ text.T) / 2).softmax(1).detach()
    logits = scale * image @ text.T
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    actual = fused(name)(**inputs)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(torch.autograd.grad(actual, [image, text, scale]),
                          torch.autograd.grad(expected, [image, text, scale]), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_part_of_the_rows_against_all_texts(small_tiles):
    """What one of several processes computes: its rows, where row 0's text has the index `first`."""
    image, text = (x.float() for x in features(170, 8))
    scale = torch.tensor(20.0)
    logits = (scale * image @ text.T).double()
    for begin, end in ((0, 40), (40, 140), (140, 170)):
        row_lse, column_lse, positive = OPS.contrastive_lse(image[begin:end], text, scale, begin)
        local = logits[begin:end]
        torch.testing.assert_close(row_lse, local.logsumexp(1), rtol=0, atol=4e-6)
        torch.testing.assert_close(column_lse, local.logsumexp(0), rtol=0, atol=4e-6)
        torch.testing.assert_close(positive, logits.diagonal()[begin:end], rtol=0, atol=4e-6)

        everyone = logits.logsumexp(0)
        d_image, d_text, d_scale = OPS.contrastive_gradient(
            image[begin:end], text, scale, row_lse, everyone, begin, 0.3, 0.1, torch.tensor(2.0)
        )
        g = 0.3 * (local - row_lse[:, None]).exp() + 0.1 * (local - everyone).exp()
        g.diagonal(begin).sub_(0.4)
        torch.testing.assert_close(d_image.double(), 40 * g @ text.double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(d_text.double(), 40 * g.T @ image[begin:end].double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(d_scale.double(), 2 * (g * local).sum() / 20, rtol=1e-4, atol=1e-4)

        for negatives_only in (False, True):
            z = -torch.ones_like(local)
            if not negatives_only:
                z.diagonal(begin).fill_(1)
            loss, *_ = OPS.sigmoid_loss(
                image[begin:end], text, scale, torch.tensor(-1.0), begin, negatives_only
            )
            expected = -F.logsigmoid(z * (local - 1)).sum() / (end - begin)
            torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_rows_whose_text_is_missing():
    image, text = (x.float() for x in features(6, 4))
    _, _, positive = OPS.contrastive_lse(image, text[:4], torch.tensor(3.0), 2)
    assert positive.isfinite().tolist() == [True, True, False, False, False, False]


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each_loss
def test_non_finite_features_never_give_a_finite_loss(name, bad, small_tiles):
    for where in ("image_features", "text_features"):
        for n in (1, 5, 150):
            inputs = {key: value.float() for key, value in inputs_of(name, n, 4).items()}
            inputs[where][n // 2, 1] = bad
            assert not fused(name)(**inputs).isfinite(), (where, n)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_scale_never_gives_a_finite_loss(bad):
    for name in LOSSES:
        inputs = {key: value.float() for key, value in inputs_of(name, 5, 4).items()}
        inputs["logit_scale"] = torch.tensor(bad)
        assert not fused(name)(**inputs).isfinite(), name


def test_scales_that_are_zero_negative_or_enormous():
    for scale in (0.0, -30.0, 3e4):
        compare("contrastive_loss", inputs_of("contrastive_loss", 33, 6, scale=scale), torch.float32, 1e-5)


def test_there_is_no_second_derivative():
    # Catches: a silent zero, which a gradient saved by the forward pass would give.
    for name in LOSSES:
        inputs = {key: value.float().requires_grad_() for key, value in inputs_of(name, 5, 3).items()}
        loss = fused(name)(**inputs)
        with pytest.raises(NotImplementedError, match="one derivative"):
            (first,) = torch.autograd.grad(loss, inputs["image_features"], create_graph=True)
            torch.autograd.grad(first.sum(), inputs["text_features"])
