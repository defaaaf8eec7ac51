"""conv3x3 of the native module against float64, on every instruction set of this processor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dalle2_fast import functional
from dalle2_fast.modules import Conv3x3
from dalle2_fast.ops import _native

if _native.WHY_ABSENT is not None:
    pytest.skip(_native.WHY_ABSENT, allow_module_level=True)

from dalle2_fast.kernels.convolution.native import WHY_NO_BFLOAT16

NHWC = torch.channels_last


def make(samples, channels, outputs, height, width, upsample=False):
    generator = torch.Generator().manual_seed(0)
    factor = 2 if upsample else 1
    x = torch.randn(samples, channels, height, width, generator=generator)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    bias = torch.randn(outputs, generator=generator)
    residual = torch.randn(samples, outputs, factor * height, factor * width, generator=generator)
    return [value.requires_grad_() for value in (x.to(memory_format=NHWC), weight, bias, residual)]


def outputs_and_gradients(impl, inputs, upsample, dtype):
    leaves = [value.detach().to(dtype).requires_grad_() for value in inputs]
    y = functional.conv3x3(*leaves, upsample, impl=impl)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


CASES = [
    # samples, C_in, C_out, H, W, upsample
    (2, 5, 3, 4, 6, False),  # no whole vector
    (1, 3, 20, 5, 7, False),  # tiles across the border
    (2, 16, 48, 9, 9, False),
    (3, 40, 64, 8, 6, False),  # panels of 32 columns
    (1, 33, 112, 17, 16, False),  # more than 64 tiles, the last ones a rest
    (1, 4, 160, 2, 1, False),
    (2, 20, 34, 3, 5, True),
    (1, 1, 1, 1, 1, True),
]


@pytest.mark.parametrize("samples, channels, outputs, height, width, upsample", CASES)
def test_close_to_truth(instructions, samples, channels, outputs, height, width, upsample):
    """Catches: a wrong transform, a wrong border, a lost rest of channels or tiles, a wrong gradient."""
    inputs = make(samples, channels, outputs, height, width, upsample)
    truth = outputs_and_gradients("reference", inputs, upsample, torch.float64)
    plain = outputs_and_gradients("reference", inputs, upsample, torch.float32)
    actual = outputs_and_gradients("fused", inputs, upsample, torch.float32)
    for value, expected, torchs in zip(actual, truth, plain, strict=True):
        assert value.dtype == torch.float32
        error, bound = (value - expected).norm(), 2 * (torchs - expected).norm() + 1e-6 * expected.norm()
        assert error <= bound


@pytest.mark.skipif(WHY_NO_BFLOAT16 is not None, reason=str(WHY_NO_BFLOAT16))
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_bfloat16_is_rounded_once(upsample, with_residual):
    """Catches: a residual of another layout, one that is added after the rounding, a wrong gradient."""
    inputs = [value.detach().bfloat16() for value in make(2, 24, 40, 6, 5, upsample)]
    inputs[3] = inputs[3].contiguous() if with_residual else None

    def results(impl, dtype):
        leaves = [None if value is None else value.to(dtype).requires_grad_() for value in inputs]
        y = functional.conv3x3(*leaves, upsample, impl=impl)
        gradients = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], torch.ones_like(y))
        return [y.detach(), *gradients]

    truth = results("reference", torch.float64)
    plain, actual = results("reference", torch.bfloat16), results("fused", torch.bfloat16)
    for value, expected, torchs in zip(actual, truth, plain, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value - expected).norm() <= 1.1 * (torchs - expected).norm() + 1e-3 * expected.norm()
    if with_residual:
        x, weight, bias, residual = inputs
        assert (actual[0] - truth[0]).norm() < 0.9 * (plain[0] - truth[0]).norm()
        with torch.no_grad():
            assert torch.equal(functional.conv3x3(x, weight, bias, residual, upsample), actual[0])


def test_the_number_of_threads_and_the_batch_change_no_bit():
    """Catches: results that depend on which tiles share a block."""
    x, weight, bias, residual = (value.detach() for value in make(3, 34, 50, 13, 12))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(functional.conv3x3(x, weight, bias, residual, impl="fused"))
    torch.set_num_threads(before)
    alone = torch.cat([functional.conv3x3(x[i : i + 1], weight, bias, residual[i : i + 1]) for i in range(3)])
    assert all(torch.equal(result, results[0]) for result in (*results, alone))
    assert results[0].is_contiguous(memory_format=NHWC)


def test_changed_weights_are_seen():
    """Catches: transformed filters that outlive a change of the weights, in place or through .data."""
    convolution = Conv3x3(32, 32)
    x = torch.randn(1, 32, 4, 4).to(memory_format=NHWC)

    def check(module):
        expected = functional.conv3x3(x, module.weight, module.bias, impl="reference")
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)

    check(convolution)
    check(convolution)
    with torch.no_grad():
        convolution.weight.mul_(2)
    check(convolution)
    convolution.weight.data.normal_()
    check(convolution)
    convolution.weight.data = torch.randn(32, 32, 3, 3)
    check(convolution)
    convolution.load_state_dict(nn.Conv2d(32, 32, 3).state_dict())
    check(convolution)
    other = copy.deepcopy(convolution)
    other.weight.data[0, 0, 0, 0] += 1
    check(other)
    check(convolution)
    with torch.inference_mode():
        check(convolution.to(memory_format=NHWC))


def test_auto_is_fused_for_float32_in_channels_last():
    """Catches: a slower choice, or the kernel for a dtype or a transform that it does not know."""
    x, weight, bias, residual = (value.detach() for value in make(1, 32, 32, 4, 4))
    fused = functional.conv3x3(x, weight, bias, residual, impl="fused")
    plain = functional.conv3x3(x, weight, bias, residual, impl="reference")
    assert not torch.equal(fused, plain)  # they round differently
    assert torch.equal(functional.conv3x3(x, weight, bias, residual), fused)
    plain = functional.conv3x3(x.contiguous(), weight, bias, residual, impl="reference")
    assert torch.equal(functional.conv3x3(x.contiguous(), weight, bias, residual), plain)
    few = functional.conv3x3(x, weight[:31], bias[:31], impl="reference")
    assert torch.equal(functional.conv3x3(x, weight[:31], bias[:31]), few)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.conv3x3(x, weight, bias).dtype == torch.bfloat16
    half = functional.conv3x3(x.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16
    _, tangent = torch.func.jvp(lambda x: functional.conv3x3(x, weight), (x,), (x,))
    torch.testing.assert_close(tangent, functional.conv3x3(x, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(1, 4, 4)), ValueError, r"x: expected \[N, C_in, H, W\], got \(1, 4, 4\)"),
        (dict(weight=torch.zeros(4, 3, 3, 3)), ValueError, r"weight: expected \[C_out, 4, 3, 3\], got"),
        (dict(bias=torch.zeros(3)), ValueError, r"bias: expected \[C_out\] = \(5,\), got \(3,\)"),
        (dict(residual=torch.zeros(1, 5, 4, 4)), ValueError, r"residual: .* = \(1, 5, 8, 8\), got \(1, 5, 4"),
        (dict(bias=torch.zeros(5).double()), TypeError, "bias: expected torch.float32 .* got torch.float64"),
        (dict(upsample=1), TypeError, "upsample: expected True or False, got int"),
        (dict(impl="fast"), ValueError, "impl: expected one of"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    given = dict(x=torch.zeros(1, 4, 4, 4), weight=torch.zeros(5, 4, 3, 3), upsample=True) | change
    with pytest.raises(error, match=message):
        functional.conv3x3(**given)


def test_fused_refuses_what_it_cannot_do():
    x, weight = torch.zeros(1, 4, 4, 4, dtype=torch.float64), torch.zeros(5, 4, 3, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no kernel takes torch.float64"):
        functional.conv3x3(x, weight, impl="fused")
    with pytest.raises(RuntimeError, match="a kernel for the CPU only, not for device meta"):
        functional.conv3x3(x.to("meta", torch.float32), weight.to("meta", torch.float32), impl="fused")


def test_empty_batch_opcheck_and_one_graph():
    """Catches: a crash for no images, fakes that lie about strides, a graph break."""
    x, weight, bias, residual = make(0, 32, 32, 4, 4)
    y = functional.conv3x3(x, weight, bias, residual, impl="fused")
    gradients = torch.autograd.grad(y.sum(), (x, weight, bias, residual))
    assert y.shape == (0, 32, 4, 4) and all(bool((gradient == 0).all()) for gradient in gradients)
    for upsample in (False, True):
        inputs = make(2, 32, 32, 4, 4, upsample)
        torch.library.opcheck(torch.ops.dalle2_fast.conv3x3.default, (*inputs, upsample))
        compiled = torch.compile(functional.conv3x3, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs, upsample), functional.conv3x3(*inputs, upsample))
