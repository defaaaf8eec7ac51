"""group_norm_silu against its formula in float64, in every layout and dtype, with gradients."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast import functional
from tests.support.truth import assert_close_to_truth, outputs_and_gradients

# [N, C, *], groups: one channel a group, odd channels per group, one group, no positions, 3-D to 5-D
SHAPES = [
    ((2, 8, 5, 3), 4),
    ((3, 15, 7), 5),
    ((1, 6, 1, 1), 3),
    ((2, 12), 4),
    ((2, 4, 3, 2, 5), 1),
    ((2, 6, 9, 1), 6),
]


def formula(x, num_groups, weight=None, bias=None, eps=1e-5, scale=None, shift=None, activation="silu"):
    """The textbook, with no torch norm in it."""
    grouped = x.reshape(x.shape[0], num_groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = (grouped - mean).square().mean(-1, keepdim=True)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    ones = (1,) * (x.dim() - 2)
    if weight is not None:
        y = y * weight.view(1, -1, *ones)
    if bias is not None:
        y = y + bias.view(1, -1, *ones)
    if scale is not None:
        y = y * (1 + scale.view(*scale.shape, *ones))
    if shift is not None:
        y = y + shift.view(*shift.shape, *ones)
    return y * torch.sigmoid(y) if activation == "silu" else y


def make(shape, mean=0.5, sigma=2.0):
    torch.manual_seed(0)
    n, c = shape[:2]
    return {
        "x": torch.randn(shape) * sigma + mean,
        "weight": torch.randn(c),
        "bias": torch.randn(c),
        "scale": torch.randn(n, c),
        "shift": torch.randn(n, c),
    }


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("given", [(), ("weight", "bias"), ("scale",), ("shift", "bias"), "all"])
@pytest.mark.parametrize("shape, groups", SHAPES)
def test_equals_formula_in_float64(shape, groups, given, activation):
    # Catches: 1 + scale forgotten, shift before scale, unbiased variance, wrong group borders.
    inputs = make(shape)
    chosen = {name: value for name, value in inputs.items() if name == "x" or given == "all" or name in given}

    def ours(**kw):
        return functional.group_norm_silu(num_groups=groups, activation=activation, **kw)

    def textbook(**kw):
        return formula(num_groups=groups, activation=activation, **kw)

    actual = outputs_and_gradients(ours, chosen, torch.float64)
    expected = outputs_and_gradients(textbook, chosen, torch.float64)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_close_to_truth_in_every_layout_and_dtype(layout, dtype):
    # Catches: rounding between norm and activation, low-precision statistics, strides taken for granted.
    inputs = make((3, 20, 6, 5))
    inputs["x"] = inputs["x"].to(dtype).float()
    if layout == "channels_last":
        inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    elif layout == "sliced":
        inputs["x"] = torch.cat((inputs["x"], inputs["x"]), 3)[..., 2:7]
    elif layout == "transposed":
        inputs["x"] = inputs["x"].transpose(2, 3)
    parameters = ("weight", "bias", "scale", "shift")  # float32, with low-precision activations

    def ours(**kw):
        return functional.group_norm_silu(num_groups=4, **kw)

    def plain(**kw):
        return formula(num_groups=4, **{k: v.to(dtype) for k, v in kw.items()})

    actual = outputs_and_gradients(ours, inputs, dtype, keep_dtype=parameters)
    truth = outputs_and_gradients(ours, inputs, torch.float64)
    assert_close_to_truth(actual, outputs_and_gradients(plain, inputs, dtype, keep_dtype=parameters), truth)
    assert actual["output"].dtype == dtype and actual["d x"].dtype == dtype
    assert actual["d weight"].dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_survives_a_large_mean(layout):
    # Catches: variance as E[x^2] - E[x]^2, which is 8 % off here. A float32 mean of 1e3 costs 3e-5.
    x = make((2, 64, 16, 16), mean=1e3, sigma=1.0)["x"].to(memory_format=layout)
    truth = functional.group_norm_silu(x.double(), 8)
    error = (functional.group_norm_silu(x, 8) - truth).norm() / truth.norm()
    assert error < 1e-4


@pytest.mark.parametrize(
    "shape, layout", [((2, 8, 4, 3), torch.channels_last), ((2, 8, 2, 4, 3), torch.channels_last_3d)]
)
def test_output_keeps_the_layout(shape, layout):
    x = torch.randn(shape)
    assert functional.group_norm_silu(x, 2).is_contiguous()
    assert functional.group_norm_silu(x.to(memory_format=layout), 2).is_contiguous(memory_format=layout)


def test_gradcheck():
    inputs = [value.double().requires_grad_() for value in make((2, 6, 3)).values()]

    def op(x, weight, bias, scale, shift):
        return functional.group_norm_silu(x, 3, weight, bias, 1e-5, scale, shift)

    assert torch.autograd.gradcheck(op, inputs)


def test_autocast_changes_nothing():
    x, weight = torch.randn(2, 8, 4), torch.randn(8)
    expected = functional.group_norm_silu(x, 2, weight)
    with torch.autocast("cpu", torch.bfloat16):
        actual = functional.group_norm_silu(x, 2, weight)
    assert torch.equal(actual, expected)


def test_empty_batch_and_positions():
    assert functional.group_norm_silu(torch.randn(0, 4, 3, 3), 2).shape == (0, 4, 3, 3)
    assert functional.group_norm_silu(torch.randn(2, 4, 0), 2).shape == (2, 4, 0)


X = torch.zeros(2, 6, 4)


@pytest.mark.parametrize(
    "kind, message, kwargs",
    [
        (TypeError, "x: expected a torch.Tensor, got list", {"x": [1.0]}),
        (TypeError, "x: expected a floating-point tensor, got torch.int64", {"x": X.long()}),
        (ValueError, r"x: expected \[N, C, ...\] .* got \(6,\)", {"x": X[0, :, 0]}),
        (ValueError, "num_groups: expected a divisor of C = 6, got 4", {"num_groups": 4}),
        (ValueError, "num_groups: expected a divisor of C = 6, got 0", {"num_groups": 0}),
        (TypeError, "num_groups: expected an int, got float", {"num_groups": 2.0}),
        (ValueError, r"weight: expected \[C\] = \(6,\), got \(5,\)", {"weight": torch.ones(5)}),
        (TypeError, "bias: expected a floating-point tensor", {"bias": torch.ones(6, dtype=torch.int32)}),
        (ValueError, r"scale: expected \[N, C\] = \(2, 6\), got \(2, 12\)", {"scale": torch.ones(2, 12)}),
        (ValueError, r"shift: expected device cpu \(that of x\), got meta",
         {"shift": torch.ones(2, 6, device="meta")}),
        (ValueError, "eps: expected a finite number, got nan", {"eps": float("nan")}),
        (ValueError, "eps: expected a number >= 0, got -1", {"eps": -1}),
        (ValueError, "activation: expected 'silu' or None, got 'relu'", {"activation": "relu"}),
        (ValueError, "impl: expected one of .* got 'fast'", {"impl": "fast"}),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_got(kind, message, kwargs):
    with pytest.raises(kind, match=message):
        functional.group_norm_silu(**{"x": X, "num_groups": 3, **kwargs})
