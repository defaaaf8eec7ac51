"""Inputs of the contrastive losses, from easy to adversarial, and the comparison with float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast import functional
from tests.support.truth import assert_close_to_truth, outputs_and_gradients

LOSSES = {
    "contrastive_loss": ("logit_scale",),
    "sigmoid_loss": ("logit_scale", "logit_bias"),
    "soft_contrastive_loss": ("logit_scale",),
}
each_loss = pytest.mark.parametrize("name", list(LOSSES))


def fused(name):
    return lambda **inputs: getattr(functional, name)(**inputs, impl="fused")


def plain(name):
    return lambda **inputs: getattr(functional, name)(**inputs, impl="reference")


def features(n, d, kind="unit"):
    generator = torch.Generator().manual_seed(n + d)
    image, text = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "unit":
        image, text = F.normalize(image, dim=-1), F.normalize(0.4 * image + text, dim=-1)
    elif kind == "easy":  # every pair is found with near certainty: p - 1 is tiny
        image, text = F.normalize(image, dim=-1), F.normalize(image + 0.1 * text, dim=-1)
    elif kind == "equal":
        image = text = F.normalize(image[:1], dim=-1).expand(n, d).clone()
    elif kind == "opposite":
        image = F.normalize(image, dim=-1)
        text = -image
    elif kind == "far":  # all cosines near -0.9: exp(L - shift) is 0 in float32, at scale 100
        image = F.normalize(0.3 * image + 10 * torch.eye(1, d), dim=-1)
        text = F.normalize(0.3 * text - 10 * torch.eye(1, d), dim=-1)
    elif kind == "mixed":  # some rows and columns overflow, some do not
        image, text = (x * 10 ** torch.linspace(-2, 2, n, dtype=x.dtype)[:, None] for x in (image, text))
    elif kind == "huge":
        image, text = 300 * image, 300 * text
    return image, text


def inputs_of(name, n, d, kind="unit", scale=14.3, dtype=torch.float64):
    image, text = features(n, d, kind)
    # The inputs are rounded to the dtype before the truth is computed, so that their rounding is no error.
    inputs = {"image_features": image.to(dtype).double(), "text_features": text.to(dtype).double()}
    scalars = {"logit_scale": torch.tensor(scale), "logit_bias": torch.tensor(-3.0)}
    return inputs | {key: scalars[key].double() for key in LOSSES[name]}


def compare(name, inputs, dtype, slack=1e-6, yardsticks=None):
    """Compare the fused loss and its gradients with float64, by the yardstick of plain torch at `dtype`.

    yardsticks: {"d ...": value}, values whose errors replace plain torch's as yardstick: for features in any
    case, for a scalar where plain torch's error is smaller.
    """
    # The scalars stay float32: rounded to bfloat16 they would define another problem.
    inputs = {key: value.float() if value.dim() == 0 else value for key, value in inputs.items()}
    scalars = LOSSES[name]
    results = [
        outputs_and_gradients(function, inputs, one, keep_dtype=scalars)
        for function, one in ((fused(name), dtype), (plain(name), dtype), (plain(name), torch.float64))
    ]
    for key in results[2]:
        if dtype != torch.float64:
            assert results[0][key].dtype == results[1][key].dtype, key
    # A scalar's gradient is a sum that cancels to a 20,000th of its terms ("far", "easy"). How close plain
    # torch comes depends on the order of the pairs by chance, so its error is the largest of a few orders.
    for seed in range(4):
        order = torch.randperm(len(inputs["image_features"]), generator=torch.Generator().manual_seed(seed))
        shuffled = {key: value[order] if value.dim() else value for key, value in inputs.items()}
        again = outputs_and_gradients(plain(name), shuffled, dtype, keep_dtype=scalars)
        for key in (f"d {scalar}" for scalar in scalars):
            results[1][key] = max(results[1][key], again[key], key=lambda x: (x - results[2][key]).abs())
    for key, value in (yardsticks or {}).items():
        pair = (value, results[1][key]) if value.dim() == 0 else (value,)
        results[1][key] = max(pair, key=lambda x, key=key: float((x - results[2][key]).norm()))
    assert_close_to_truth(*results, slack=slack)
