"""group_norm_silu of the native module against float64, on every instruction set of this processor."""

from __future__ import annotations

import math

import pytest
import torch

from dalle2_fast import functional
from dalle2_fast.ops import _native
from tests.support.norm_cases import BF16, FP16, FP32, NCHW, NDHWC, NHWC, PARAMETERS, compare, make, step

if _native.WHY_ABSENT is not None:
    pytest.skip(_native.WHY_ABSENT, allow_module_level=True)

@pytest.fixture(autouse=True)
def poison():
    """New memory is filled with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


CASES = [
    # shape, groups, layout, dtype, given, activation
    ((2, 6, 5, 3), 2, NCHW, FP32, PARAMETERS, "silu"),  # no whole vector
    ((3, 112, 9, 7), 8, NHWC, FP32, PARAMETERS, "silu"),
    ((3, 112, 9, 7), 8, NHWC, BF16, PARAMETERS, "silu"),
    ((3, 48, 16, 16), 8, NCHW, BF16, PARAMETERS, "silu"),
    ((2, 20, 4, 4), 2, NHWC, FP16, PARAMETERS, None),
    ((2, 20, 4, 4), 2, NCHW, FP16, PARAMETERS, "silu"),
    ((2, 40, 9), 4, NCHW, FP32, (), "silu"),
    ((3, 24), 4, NCHW, FP32, ("bias", "scale"), "silu"),
    ((2, 600, 3, 3), 30, NHWC, FP32, ("weight", "shift"), "silu"),  # more columns than are summed at once
    ((1, 6, 3, 2, 2), 2, NDHWC, FP32, ("weight",), "silu"),
    ((1, 8, 3, 3), 8, NCHW, BF16, ("shift",), "silu"),  # one channel a group
    ((1, 40, 50, 41), 2, NHWC, FP32, PARAMETERS, "silu"),  # several chunks, shared by the threads
    ((1, 40, 50, 41), 1, NCHW, FP32, PARAMETERS, "silu"),
]


@pytest.mark.parametrize("shape, groups, layout, dtype, given, activation", CASES)
def test_close_to_truth(instructions, threads, shape, groups, layout, dtype, given, activation):
    """Catches: a wrong formula, a wrong end of a row or of a group, rounding in between, in any set."""
    compare(shape, groups, dtype=dtype, device="cpu", layout=layout, given=given, activation=activation)


@pytest.mark.parametrize("layout", [NCHW, NHWC])
@pytest.mark.parametrize("shape, groups", [((5, 48, 30, 31), 4), ((1, 64, 65, 33), 4)])
def test_the_number_of_threads_changes_no_bit(layout, shape, groups):
    """Catches: sums that are cut by the threads, which share whole samples or the chunks of one sample."""
    inputs = make(shape, "cpu", layout=layout)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        results.append(step(inputs["x"], groups, inputs, dy))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("kind", ["channels_last", "transposed", "expanded", "cropped"])
@pytest.mark.parametrize("layout", [NCHW, NHWC])
def test_gradient_in_any_layout(kind, layout):
    """Catches: dy read as if it lay like x."""
    shape, groups = (2, 6, 4, 6), 2
    inputs = make(shape, "cpu", layout=layout)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    dy = {
        "channels_last": lambda: dy.to(memory_format=torch.channels_last),
        "transposed": lambda: dy.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda: dy[:, :, :1, :1].expand(shape),
        "cropped": lambda: torch.cat((dy, dy), 3)[..., :6],
    }[kind]()
    results = step(inputs["x"], groups, inputs, dy), step(inputs["x"], groups, inputs, dy, "reference")
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [NCHW, NHWC])
def test_survives_a_large_mean_and_an_outlier_first(instructions, layout):
    """Catches: E[x^2] - E[x]^2, float32 sums of numbers near 1e3, squares about an outlier."""
    x = make((1, 8, 8, 8), "cpu", mean=1e3, sigma=1.0, layout=layout)["x"]
    for bound in (1e-6, 1e-4):
        truth = functional.group_norm_silu(x.double(), 2)
        error = (functional.group_norm_silu(x, 2, impl="fused") - truth).norm() / truth.norm()
        assert error < bound
        x[:, ::4, 0, 0] = 0


def test_what_is_not_finite_stays_in_its_group(instructions):
    """Catches: a NaN that the maximum of the sigmoid's argument drops, or that spreads to other groups."""
    for layout in (NCHW, NHWC):
        for value in (math.nan, math.inf):
            x = make((2, 8, 6, 6), "cpu", layout=layout)["x"]
            x[1, 5, 2, 3] = value
            y = functional.group_norm_silu(x, 2, impl="fused")
            assert bool(y[1, 4:].isnan().all()) and bool(y[0].isfinite().all() and y[1, :4].isfinite().all())


def test_sigmoid_far_from_zero(instructions):
    """Catches: overflow of the exponential: silu(-200) is 0 and silu(200) is 200, for every dtype."""
    x = torch.tensor([[-1.0, 1.0]]).repeat(1, 16)[:, :, None].expand(1, 32, 20)
    for dtype in (FP32, BF16, FP16):
        weight = torch.full((32,), 200.0)
        y = functional.group_norm_silu(x.to(dtype), 1, weight, eps=0.0, impl="fused")
        assert y[0, 0].abs().max() < 1e-3 and bool((y[0, 1] == 200).all())


def test_half_precision_values_convert_exactly(instructions):
    """Catches: subnormals, ties or overflow that are converted otherwise than torch converts them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (FP16, BF16):
        x = bits.view(dtype)
        x = x[x.isfinite() & (x.abs() < 1e10)]
        if instructions == "AVX-512 with BF16" and dtype == BF16:
            x = x[(x == 0) | (x.abs() >= torch.finfo(BF16).tiny)]  # its instruction makes the others 0
        x = x[x.abs().sort(stable=True).indices].reshape(1, 1, -1)  # v after -v: every mean is 0
        # eps makes rstd 1e-15 and the weight undoes it. 1 + 2^-9 lies between two bfloat16 values.
        for factor in (1.0, 1 + 2**-9, 1 + 2**-12, 1e6):
            weight = torch.tensor([1e15 * factor], dtype=torch.float64)
            y = functional.group_norm_silu(x, 1, weight, eps=1e30, activation=None, impl="fused")
            expected = (x.double() * factor).float().to(dtype)
            # A rounded factor decides a few ties otherwise.
            assert (y != expected).double().mean() < (1e-6 if factor == 1 else 0.01)
            torch.testing.assert_close(y, expected, rtol=2**-7 if dtype == BF16 else 2**-9, atol=1e-7)


def test_film_and_x_are_read_in_place():
    """Catches: strides of the batch or of the embedding taken for C * P and C."""
    inputs = make((4, 6, 3, 3), "cpu")
    x = inputs["x"][1::2]
    scale, shift = torch.cat((inputs["scale"], inputs["shift"]), 1)[1::2].chunk(2, 1)
    actual = functional.group_norm_silu(x, 2, scale=scale, shift=shift, impl="fused")
    expected = functional.group_norm_silu(x, 2, scale=scale, shift=shift, impl="reference")
    assert actual.is_contiguous() and not scale.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0)])
def test_empty(shape):
    inputs = make(shape, "cpu")
    y, *gradients = step(inputs["x"], 2, inputs, torch.empty(shape))
    assert y.shape == shape
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize("layout", [NCHW, NHWC])
def test_opcheck(layout):
    """Catches: a wrong schema, fakes that lie about shape, dtype or strides, an untraceable gradient."""
    inputs = {name: value.requires_grad_() for name, value in make((1, 4, 2, 2), "cpu").items()}
    x = inputs["x"].detach().to(memory_format=layout).requires_grad_()
    functional.group_norm_silu(x, 2, impl="fused")
    arguments = (x, 2, inputs["weight"], inputs["bias"], 1e-5, inputs["scale"], inputs["shift"], True)
    torch.library.opcheck(torch.ops.dalle2_fast.group_norm_silu.default, arguments)


def test_compiles_into_one_graph_and_ignores_autocast():
    """Catches: a graph break, a gradient that the compiler loses, statistics in bfloat16."""
    inputs = make((2, 4, 3, 3), "cpu")

    def run(x):
        return functional.group_norm_silu(x, 2, inputs["weight"], scale=inputs["scale"])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        x = inputs["x"].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        results.append((y, dx))
    assert results[0][0].dtype == FP32
    assert all(map(torch.equal, *results))


def test_raw_op_refuses_float64():
    """Catches: uninitialised memory as the result of a dtype that no loop was compiled for."""
    x = make((1, 4, 2, 2), "cpu")["x"]
    functional.group_norm_silu(x, 2, impl="fused")
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16, got torch.float64"):
        torch.ops.dalle2_fast.group_norm_silu(x.double(), 2, None, None, 1e-5, None, None, True)
