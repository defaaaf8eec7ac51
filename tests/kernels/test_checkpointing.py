"""Activation checkpointing (torch.utils.checkpoint) around every fused op."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dalle2_fast import functional
from dalle2_fast.ops import _native

pytest.importorskip("triton")

LOSSES = ("contrastive_loss", "sigmoid_loss", "soft_contrastive_loss")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def attention(keys, dtype=torch.float32, image_keys=None):
    q, k, v = draw(1, 2, 5, 32), draw(1, 2, keys, 32), draw(1, 2, keys, 32).flip(0)
    image = () if image_keys is None else (draw(1, 2, image_keys, 32), draw(1, 2, image_keys, 32))

    def run(q, k, v, image_k=None, image_v=None):
        return functional.cross_attention(q, k, v, image_k=image_k, image_v=image_v, impl="fused")

    return run, [value.to(dtype) for value in (q, k, v, *image)]


def norm():
    def run(x, weight, bias, scale, shift):
        return functional.group_norm_silu(x, 2, weight, bias, 1e-5, scale, shift, impl="fused")

    return run, [draw(2, 4, 3, 3), draw(4), draw(4) + 1, draw(2, 4), draw(2, 4) + 1]


def loss(name):
    def run(image, text, scale):
        bias = {"logit_bias": -1.0} if name == "sigmoid_loss" else {}
        return getattr(functional, name)(image, text, scale, impl="fused", **bias)

    return run, [draw(6, 3), draw(6, 3).flip(0), torch.tensor(2.0)]


def noise(given):
    def run(x0, alpha, sigma, noise=None):
        seeds = None if given else torch.tensor([3, 4], device=x0.device)
        return functional.add_noise(x0, alpha, sigma, noise, seeds, impl="fused")[0]

    return run, [draw(2, 7), draw(2), draw(2) + 1, *([draw(2, 7) + 1] if given else [])]


CASES = {
    "cross_attention, short": lambda: attention(7, torch.float16),
    "cross_attention, long": lambda: attention(7),
    "cross_attention, image keys": lambda: attention(7, image_keys=3),
    "cross_attention, no image keys": lambda: attention(7, torch.float16, image_keys=0),
    "group_norm_silu": norm,
    "add_noise": lambda: noise(True),
    "add_noise, seeds": lambda: noise(False),
    **{name: (lambda name=name: loss(name)) for name in LOSSES},
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_without_checkpointing(case, use_reentrant, kernel_device):
    # Catches: saved tensors that the backward pass takes twice, which checkpointing refuses.
    if case in LOSSES and (_native.WHY_ABSENT is not None or kernel_device == "cuda"):
        pytest.skip("needs dalle2_fast._C for the CPU")
    function, inputs = CASES[case]()
    leaves = [value.to(kernel_device).requires_grad_() for value in inputs]
    output = function(*leaves)
    weight = draw(*output.shape).to(output)
    expected = torch.autograd.grad(output, leaves, weight)
    again = checkpoint(function, *leaves, use_reentrant=use_reentrant)
    again.backward(weight)
    assert torch.equal(again, output)
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)
