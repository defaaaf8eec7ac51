"""csrc/sm90/contrastive.cu without a Hopper GPU: the unmodified file runs on modelled hardware."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.native.emulated_sm90 import (
    DTYPES,
    EARLY_COPIES,
    LATE_COPIES,
    MEBIBYTE,
    Kernels,
    Matrices,
    assert_near,
    features,
    small,
    truth_of,
)

# (rows, columns, width, dtype, diagonal offset, order of events, bytes for partial sums). Together they have
# edges in every direction and none, tiles of more and of fewer stages than the pipeline, positives in some
# tiles, in all and in none, several chunks, and more tiles than clusters.
CASES = {
    "edges, chunks": (300, 530, 100, torch.bfloat16, 7, EARLY_COPIES, 1),
    "edges, late copies": (300, 530, 100, torch.bfloat16, -200, LATE_COPIES, MEBIBYTE),
    "whole tiles, no positives": (256, 512, 64, torch.float16, 10_000, EARLY_COPIES, MEBIBYTE),
    "a long pipeline": (70, 40, 390, torch.float16, 0, LATE_COPIES, MEBIBYTE),
    "a long pipeline, early copies": (130, 257, 328, torch.bfloat16, 100, EARLY_COPIES, MEBIBYTE),
    "one pair": (1, 1, 3, torch.bfloat16, 0, EARLY_COPIES, MEBIBYTE),
}


@pytest.fixture(params=CASES, scope="module")
def case(request, emulated_sm90):
    rows, columns, width, dtype, diagonal_offset, order, partial_bytes = CASES[request.param]
    emulated_sm90.configure(2, *order, partial_bytes)
    emulated_sm90.set_why_device_unavailable(None)
    image, text = features(rows, columns, width, dtype, diagonal_offset=diagonal_offset)
    return Kernels(emulated_sm90, image, text, diagonal_offset), *truth_of(image, text, diagonal_offset)


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_sums_of_exponentials(case, scale):
    """Catches a wrong fragment, swizzle, mask, slot or chunk: each moves some row's or column's sum."""
    kernels, products, is_positive = case
    row_lse, column_lse, positive_products = kernels.lse(scale)
    assert not kernels.summed_twice  # the second sums would hide an error of the first
    logits = scale * products
    rounding = 1e-5 + 4e-7 * scale  # of exponentials and their sums, and of products in fp32
    assert (row_lse - logits.logsumexp(1)).abs().max() < rounding
    assert (column_lse - logits.logsumexp(0)).abs().max() < rounding
    has = is_positive.any(1)
    assert (positive_products[has] - products[is_positive]).abs().max() < 1e-6 if has.any() else True
    assert bool(positive_products[~has].isnan().all())


def test_gradient_of_logits(case):
    kernels, products, is_positive = case
    scale, row_weight, column_weight = 30.0, 0.75, 1.5
    logits = scale * products
    row_lse, column_lse = logits.logsumexp(1), logits.logsumexp(0)
    truth = row_weight * (logits - row_lse[:, None]).exp() + column_weight * (logits - column_lse).exp()
    truth = truth - (row_weight + column_weight) * is_positive
    gradient, slope = kernels.gradient(scale, row_lse, column_lse, row_weight, column_weight)
    if gradient.numel() > 1:
        assert_near(gradient, truth, 2.5e-3, floor=1e-3)
        assert abs(slope - (truth * products).sum()) <= 1e-5 * (truth * products).abs().sum()
    else:
        assert abs(gradient.item()) < 1e-5  # one pair: p is 1


def test_sigmoid_loss(case):
    kernels, products, is_positive = case
    scale, bias = 10.0, -3.0  # exp(-|L|) on both sides of 1/16
    signs = 2.0 * is_positive - 1
    logits = scale * products + bias
    losses, truth = -F.logsigmoid(signs * logits), -signs * torch.sigmoid(-signs * logits)
    gradient, sums = kernels.sigmoid(scale, bias)
    assert_near(gradient, truth, 2.5e-3, floor=1e-6)
    for actual, terms in zip(sums, (losses, truth * products, truth), strict=True):
        assert abs(actual - terms.sum()) <= 3e-6 * terms.abs().sum()
    if kernels.image.shape[0] < 100:
        assert torch.equal(kernels.sigmoid(scale, bias, with_gradient=False)[1], sums)


@pytest.mark.parametrize("kind", ["opposite", "un-normalised", "one row opposite"])
def test_sums_about_their_maximum(emulated_sm90, kind):
    """Catches sums about one shift where these are 0 or infinite."""
    image, text = features(80, 72, 64)
    if kind == "opposite":
        image = -image[:72].abs()
        text = text.abs()
    elif kind == "un-normalised":
        image = 30 * image[:72]
    else:
        image, text = image[:72].abs(), text.abs()
        image[5] *= -1
    scale = 100.0
    kernels = small(emulated_sm90, image, text, LATE_COPIES)
    row_lse, column_lse, _ = kernels.lse(scale)
    assert kernels.summed_twice
    logits = scale * truth_of(image, text, 0)[0]
    for actual, truth in ((row_lse, logits.logsumexp(1)), (column_lse, logits.logsumexp(0))):
        assert ((actual - truth) / truth.abs().clamp(min=10)).abs().max() < 3e-6
    # Such lse are too far from the shift for one exponential per element.
    gradient, _ = kernels.gradient(scale, row_lse, column_lse, 1.0, 1.0)
    truth = (logits - row_lse[:, None]).exp() + (logits - column_lse).exp() - 2 * torch.eye(72)
    assert_near(gradient, truth, 3e-3)


def test_gradient_of_logits_of_any_size(emulated_sm90):
    """Catches an lse rounded to one float: of logits of 1e6 that is up to 0.06, or 6 % of an exponential."""
    generator = torch.Generator().manual_seed(0)
    # Integers: products, and logits at scale 16, are exact for any order of a sum.
    image, text = (torch.randint(-100, 101, (72, 64), generator=generator).bfloat16() for _ in range(2))
    logits = 16 * truth_of(image, text, 0)[0]
    row_lse, column_lse = (logits.amax(k) + torch.linspace(0.1, 1, 72, dtype=torch.float64) for k in (1, 0))
    assert row_lse.min() > 5e5
    gradient, _ = small(emulated_sm90, image, text).gradient(16.0, row_lse, column_lse, 1.0, 1.0)
    truth = (logits - row_lse[:, None]).exp() + (logits - column_lse).exp() - 2 * torch.eye(72)
    torch.testing.assert_close(gradient.double(), truth, rtol=2**-8, atol=1e-6)


def test_easy_pairs_keep_their_gradient(emulated_sm90):
    """p of a positive pair is 1 - 1e-6 or closer to 1: from a sum of floats, 1 - p would be only rounding."""
    image, text = features(64, 64, 256, torch.float16, like=0.45)
    kernels = small(emulated_sm90, image, text)
    scale = 35.0
    logits = scale * truth_of(image, text, 0)[0]
    row_lse, column_lse, positive_products = kernels.lse(scale)
    easiness = row_lse - (torch.tensor(scale) * positive_products).double()
    truth = logits.logsumexp(1) - logits.diagonal()
    assert truth.min() < 1e-6
    assert ((easiness - truth).abs() / truth).max() < 1e-4
    gradient, _ = kernels.gradient(scale, row_lse, column_lse, 1000.0, 1000.0)
    p_minus_1 = torch.expm1(logits.diagonal() - logits.logsumexp(1))
    p_minus_1 += torch.expm1(logits.diagonal() - logits.logsumexp(0))
    assert_near(gradient.diagonal(), 1000 * p_minus_1, 1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_features(emulated_sm90, value):
    image, text = features(72, 72, 64)
    image[3, 5] = value
    kernels = small(emulated_sm90, image, text)
    row_lse, column_lse, positive_products = kernels.lse(10.0)
    assert not (row_lse[3] - 10 * positive_products[3].double()).isfinite()
    assert not kernels.sigmoid(10.0, -10.0)[1][0].isfinite()


def test_equal_bits_for_any_order_of_events(emulated_sm90):
    image, text = features(200, 300, 80)
    results = []
    for clusters, order in ((1, EARLY_COPIES), (3, LATE_COPIES)):
        kernels = small(emulated_sm90, image, text)
        emulated_sm90.configure(clusters, *order, MEBIBYTE)
        row_lse, column_lse, _ = kernels.lse(50.0)
        gradient, slope = kernels.gradient(50.0, row_lse, column_lse, 0.5, 0.5)
        results.append((row_lse, column_lse, gradient, torch.tensor(slope)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_why_unavailable(emulated_sm90):
    emulated_sm90.set_why_device_unavailable(None)
    image, text = features(8, 8, 24)
    whole = Matrices(image.data_ptr(), text.data_ptr(), 32, 32, 8, 8, 24, 0, DTYPES[torch.bfloat16])

    def reason(**changes) -> str | None:
        fields = {name: getattr(whole, name) for name, _ in Matrices._fields_} | changes
        found = emulated_sm90.why_unavailable(Matrices(*fields.values()))
        return found.decode() if found else None

    assert reason() is None
    assert "16 bytes" in reason(image=image.data_ptr() + 2)
    assert "16 bytes" in reason(text_stride=33)
    assert "overlap" in reason(image_stride=16)
    assert "bfloat16" in reason(dtype=0)
    assert "no features" in reason(width=0)
    assert "2^30" in reason(columns=1 << 31)
    emulated_sm90.set_why_device_unavailable(b"another GPU")
    assert reason() == "another GPU"


def test_workspace_is_bounded(emulated_sm90):
    emulated_sm90.configure(2, *EARLY_COPIES, 128 * MEBIBYTE)
    assert emulated_sm90.workspace_bytes(32_768, 32_768, 512) < 130 * MEBIBYTE
    assert emulated_sm90.workspace_bytes(131_072, 131_072, 768) < 132 * MEBIBYTE
