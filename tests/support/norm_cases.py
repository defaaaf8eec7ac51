"""Inputs of group_norm_silu, and the comparison of its kernels with float64."""

from __future__ import annotations

import torch

from dalle2_fast import functional
from tests.support.truth import assert_close_to_truth, outputs_and_gradients

PARAMETERS = ("weight", "bias", "scale", "shift")
NCHW, NHWC, NDHWC = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def make(shape, device, mean=0.5, sigma=2.0, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    n, c = shape[:2]
    sizes = {"weight": (c,), "bias": (c,), "scale": (n, c), "shift": (n, c)}
    x = torch.randn(shape, generator=generator) * sigma + mean
    return {"x": x.to(device, memory_format=layout)} | {
        name: torch.randn(size, generator=generator).to(device) for name, size in sizes.items()
    }


def plain_norm(groups, activation, x, weight=None, bias=None, scale=None, shift=None):
    """The op in ordinary torch, which rounds after every step."""
    if weight is None:
        # torch's backward fails on a bias alone.
        weight = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    y = torch.nn.functional.group_norm(x, groups, weight, bias)
    ones = (1,) * (y.dim() - 2)
    if scale is not None:
        y = y * (1 + scale.view(*scale.shape, *ones))
    if shift is not None:
        y = y + shift.view(*shift.shape, *ones)
    return torch.nn.functional.silu(y) if activation else y


def compare(
    shape, groups, *, dtype, device, layout=torch.contiguous_format, given=PARAMETERS, activation="silu"
):
    """Errors of values and all gradients against float64, next to those of plain torch at this dtype."""
    inputs = make(shape, device, layout=layout)
    inputs["x"] = inputs["x"].to(dtype).float()
    inputs = {name: value for name, value in inputs.items() if name == "x" or name in given}

    def fused(**kw):
        return functional.group_norm_silu(num_groups=groups, activation=activation, impl="fused", **kw)

    def reference(**kw):
        return functional.group_norm_silu(num_groups=groups, activation=activation, impl="reference", **kw)

    def plain(**kw):
        return plain_norm(groups, activation, **{name: value.to(dtype) for name, value in kw.items()})

    actual = outputs_and_gradients(fused, inputs, dtype, keep_dtype=PARAMETERS)
    truth = outputs_and_gradients(reference, inputs, torch.float64)
    assert_close_to_truth(actual, outputs_and_gradients(plain, inputs, dtype, keep_dtype=PARAMETERS), truth)
    for name in ("output", "d x"):
        assert actual[name].dtype == dtype and actual[name].stride() == inputs["x"].stride(), name


def step(x, groups, inputs, dy, impl="fused"):
    """y and the gradients for a given dy, as a list."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format), *(inputs[name] for name in PARAMETERS)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x, weight, bias, scale, shift = leaves
    y = functional.group_norm_silu(x, groups, weight, bias, 1e-5, scale, shift, impl=impl)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]
