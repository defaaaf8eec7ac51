"""diffusion_step and the noise ops of the native module against float64, on every instruction set."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle2_fast import functional, reference
from dalle2_fast.ops import _native
from tests.support.diffusion.step_cases import (
    CASES,
    SEEDS,
    TABLE,
    check_step,
    draw,
    op_calls,
    step_inputs,
    viewed,
)
from tests.support.truth import assert_close_to_truth

if _native.WHY_ABSENT is not None:
    pytest.skip(_native.WHY_ABSENT, allow_module_level=True)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
EVERYTHING = CASES["everything"]
VIEWS = ["contiguous", "transposed", "strided", "more channels"]


@pytest.fixture(autouse=True)
def poison():
    """New memory is filled with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def any_threads():
    yield
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("name", CASES)
def test_close_to_truth(name, instructions):
    """Catches: a wrong formula, a wrong end of a row, noise of another element, in any set."""
    check_step(step_inputs((2, 3, 5, 7), "cpu", **CASES[name]))


# Several rows and pieces of a sample, of which the last are not whole; 74 * 75 is no multiple of four.
LARGE = {
    "contiguous": ((2, 3, 74, 75), EVERYTHING),
    "output nhwc": ((2, 3, 74, 75), {**EVERYTHING, "nhwc": "o"}),
    "x nhwc": ((2, 3, 74, 75), {**EVERYTHING, "nhwc": "x"}),
    "float16": ((2, 2, 64, 64), {**EVERYTHING, "dtype": FP16, "nhwc": "p"}),
    "bfloat16": ((2, 2, 64, 64), {**EVERYTHING, "dtype": BF16}),
    "vectors": ((2, 1030), {**EVERYTHING, "output_dtype": BF16}),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_samples(name, instructions):
    """Catches: rows or pieces that are cut at the wrong place, statistics of a part of a sample."""
    shape, options = LARGE[name]
    check_step(step_inputs(shape, "cpu", **options))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch=st.integers(1, 2),
    prediction=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    guidance=st.sampled_from([None, 2.5]),
    quantile=st.sampled_from([None, 0.3, 0.99]),
    learned_range=st.booleans(),
    views=st.tuples(*[st.sampled_from(VIEWS)] * 3),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP16, BF16])] * 2),
)
def test_any_shape_strides_and_dtypes(
    shape, batch, prediction, guidance, quantile, learned_range, views, dtypes
):
    """Catches: strides or a dtype of one tensor that are used for another."""
    arguments = step_inputs(
        (batch, *shape), "cpu", prediction=prediction, guidance=guidance, dynamic_threshold=quantile,
        clip=0.3, learned_range=learned_range, previous=True, dtype=dtypes[0], output_dtype=dtypes[1],
    )  # fmt: skip
    x, output, previous = arguments["x"], arguments["model_output"], arguments["previous_x0"]
    arguments["model_output"] = viewed(output, views[0])
    arguments["previous_x0"] = viewed(previous, views[1])
    expected = functional.diffusion_step(**{**arguments, "x": x.contiguous()}, impl="fused")
    actual = functional.diffusion_step(**{**arguments, "x": viewed(x, views[2])}, impl="fused")
    assert all(map(torch.equal, actual, expected))
    check_step({**arguments, "x": x.contiguous()})


@pytest.mark.parametrize("nhwc", ["", "xo"])
def test_the_number_of_threads_changes_no_bit(nhwc, any_threads):
    """Catches: a sum, or noise, that depends on how the threads share the work."""
    arguments = step_inputs((3, 3, 96, 97), "cpu", nhwc=nhwc, **EVERYTHING)
    x, seeds = arguments["x"], arguments["seeds"]
    results = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        noised = functional.add_noise(x, torch.rand(3), TABLE[:, 1], seeds=seeds, step=5, impl="fused")
        noise = functional.sample_noise(seeds, 5, x.shape)
        results.append([*functional.diffusion_step(**arguments, impl="fused"), noised[1], noise])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_a_sample_does_not_depend_on_its_batch_mates():
    """Catches: statistics, a guidance or a seed of another sample."""
    options = {**EVERYTHING, "guidance": torch.tensor([1.0, 2.0, 3.0])}
    arguments = step_inputs((3, 3, 24, 30), "cpu", **options)
    together = functional.diffusion_step(**arguments, impl="fused")
    alone = {**arguments, "model_output": arguments["model_output"][2::3]}
    for name in ("x", "previous_x0", "seeds", "guidance"):
        alone[name] = arguments[name][2:]
    for value, expected in zip(functional.diffusion_step(**alone, impl="fused"), together, strict=True):
        assert torch.equal(value[0], expected[2])


@pytest.mark.parametrize("n", [1, 2, 127, 20000])
@pytest.mark.parametrize("p", [1e-5, 0.3, 0.5, 0.995, 1.0])
def test_the_threshold_is_the_exact_quantile(n, p):
    """Catches: a rank that is off by one, ties and buckets of equal numbers, a wrong interpolation."""
    x0 = torch.stack((torch.zeros(n), torch.full((n,), -2.5), draw(n).round(), draw(n), draw(n).exp()))
    arguments = dict(x=x0, model_output=x0, table=TABLE, step=0, prediction="sample", dynamic_threshold=p)
    _, actual = functional.diffusion_step(**arguments, clip=1e-3, impl="fused")
    _, expected = functional.diffusion_step(**arguments, clip=1e-3, impl="reference")
    torch.testing.assert_close(actual, expected, rtol=3e-7, atol=0)


def test_what_is_not_finite_stays_so(instructions):
    """Catches: a clamp or a quantile that turns the NaN of a diverged sample into a harmless number."""
    for option in ({"clip": 1.0}, {"dynamic_threshold": 1.0}, {"dynamic_threshold": 0.5}, {}):
        arguments = step_inputs((2, 3, 3, 3), "cpu", prediction="sample", seeds=False, **option)
        arguments["model_output"][0, 0, 0, 0] = float("nan")
        arguments["model_output"][1, 1, 0, 0] = -float("inf")
        actual = functional.diffusion_step(**arguments, impl="fused")
        expected = functional.diffusion_step(**arguments, impl="reference")
        for value, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, right, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_constant_outputs_have_no_deviation():
    """Catches: a quotient of two deviations that are 1e-9 by rounding, where both are 0."""
    arguments = step_inputs((2, 3, 40, 40), "cpu", guidance=3.0, guidance_rescale=0.7, seeds=False)
    arguments["model_output"].fill_(0.1)
    actual = functional.diffusion_step(**arguments, impl="fused")
    expected = functional.diffusion_step(**arguments, impl="reference")
    for value, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)


def test_step_guidance_and_table_in_other_forms():
    """Catches: a row, a guidance or a seed that is read at a wrong address."""
    arguments = step_inputs((3, 3, 3, 3), "cpu", guidance=2.5)
    expected = functional.diffusion_step(**arguments, impl="fused")
    spread = torch.stack((arguments["seeds"], arguments["seeds"] + 1), 1)[:, 0]
    changes = [
        {"step": 1}, {"step": torch.tensor([1])}, {"table": TABLE.double()}, {"seeds": spread},
        {"table": TABLE.repeat_interleave(2, 0)[::2]}, {"guidance": torch.tensor(2.5)},
        {"guidance": torch.full((3,), 2.5, dtype=torch.float64)}, {"guidance": torch.tensor([2.5]).expand(3)},
    ]  # fmt: skip
    for change in changes:
        actual = functional.diffusion_step(**{**arguments, **change}, impl="fused")
        assert all(map(torch.equal, actual, expected)), change


@pytest.mark.parametrize("number", [-1, 3, 2**40])
@pytest.mark.parametrize("batch", [0, 2])
def test_a_step_that_is_no_row(number, batch):
    """Catches: coefficients from the memory behind the table or in front of it."""
    arguments = {**step_inputs((batch, 3, 4), "cpu"), "step": torch.tensor(number)}
    for impl in ("fused", "reference"):
        message = rf"step: expected 0 <= step < 3 \(the rows of table\), got {number}"
        with pytest.raises(ValueError, match=message):
            functional.diffusion_step(**arguments, impl=impl)


# ------------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (1, 1), (2, 2, 72, 73), (3,)])
def test_noise_is_that_of_the_reference(shape, dtype, instructions):
    """Catches: another order of the elements, halves of seed or step that are dropped, a coarse logarithm."""
    seeds, step = torch.tensor(SEEDS)[: shape[0]], 2**40 + 5
    actual = functional.sample_noise(seeds, step, shape, dtype=dtype)
    plain = reference.sample_noise(seeds, step, shape, dtype)
    truth = reference.sample_noise(seeds, step, shape, torch.float64)
    assert_close_to_truth(actual, plain, truth)
    torch.testing.assert_close(actual.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(actual, functional.sample_noise(seeds, torch.tensor(step), shape, dtype=dtype))


def test_many_numbers_are_as_exact(instructions):
    """Catches: a wrong logarithm near 1, or a wrong sine near a quarter turn, which few numbers meet."""
    seeds = torch.tensor([11])
    actual = functional.sample_noise(seeds, 3, (1, 2**18))
    truth = reference.sample_noise(seeds, 3, (1, 2**18), torch.float64)
    assert (actual - truth).norm() < 7e-8 * truth.norm()
    assert (actual - truth).abs().max() < 6e-7  # one unit in the last place of the largest number, 4.6
    small = truth.abs() < 1e-3
    assert small.sum() > 100 and (actual - truth)[small].abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("view", [*VIEWS, "nhwc"])
@pytest.mark.parametrize("drawn", [True, False])
def test_add_noise(view, drawn, dtype, instructions):
    """Catches: noise that is added before it is rounded, or in the order of another layout."""
    x0, noise = (draw(2, 3, 5, 15, seed=seed).to(dtype) for seed in (0, 1))
    nhwc = x0.contiguous(memory_format=torch.channels_last)
    x0 = nhwc if view == "nhwc" else viewed(x0, view)
    alpha, sigma = torch.tensor([0.3, 0.8]), torch.tensor([0.9, 0.5], dtype=torch.float64)
    source = {"seeds": torch.tensor(SEEDS[:2]), "step": 7} if drawn else {"noise": noise}
    x_t, added = functional.add_noise(x0, alpha, sigma, **source, impl="fused")
    if drawn:
        noise = functional.sample_noise(source["seeds"], 7, x0.shape, dtype=dtype)
    assert torch.equal(added, noise)
    plain, _ = functional.add_noise(x0, alpha, sigma, noise, impl="reference")
    truth, _ = functional.add_noise(*(v.double() for v in (x0, alpha, sigma, noise)), impl="reference")
    assert_close_to_truth(x_t, plain, truth)
    assert x_t.dtype == dtype and x_t.stride() == (nhwc if view == "nhwc" else x0.contiguous()).stride()


@pytest.mark.parametrize("drawn", [True, False])
def test_gradients_of_add_noise(drawn):
    """Catches: a gradient that the native op lost, or gives to noise that was drawn."""
    tensors = {"x0": draw(2, 3, 4), "alpha": torch.rand(2), "sigma": torch.rand(2)}
    if not drawn:
        tensors["noise"] = draw(2, 3, 4, seed=1)
    seeds = {"seeds": torch.tensor(SEEDS[:2]), "step": 7} if drawn else {}

    def gradients(impl, dtype=FP32):
        leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in tensors.items()}
        x_t, _ = functional.add_noise(**leaves, **seeds, impl=impl)
        (x_t * draw(2, 3, 4, seed=5).to(x_t)).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    truth = gradients("reference", torch.float64)
    assert_close_to_truth(gradients("fused"), gradients("reference"), truth)


# ----------------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("name", ["sample_noise", "add_noise", "add_drawn_noise", "diffusion_step"])
def test_opcheck(name):
    """Catches: a wrong schema, a fake that lies about shape or strides, an untraceable gradient."""
    functional.sample_noise(torch.tensor([1]), 0, (1, 2))  # loads the ops
    op, arguments, options = op_calls("cpu")[name]
    torch.library.opcheck(op.default, arguments, options)


def test_compiles_into_one_graph_and_ignores_autocast():
    """Catches: a graph break, a step that is frozen into the graph, maths in bfloat16."""
    arguments = step_inputs((2, 2, 3, 3), "cpu", guidance=torch.tensor(2.0), clip=1.0)
    x, seeds, _ = arguments.pop("x"), arguments["seeds"], arguments.pop("step")

    def noise_and_step(x, step):
        noise = functional.sample_noise(seeds, step, tuple(x.shape))
        x_t, _ = functional.add_noise(x, x[:, 0, 0, 0], x[:, 0, 0, 0], seeds=seeds, step=step)
        with torch.no_grad():
            return noise, x_t, *functional.diffusion_step(x, step=step, **arguments)

    compiled = torch.compile(noise_and_step, fullgraph=True, backend="aot_eager")
    for step in (torch.tensor(0), torch.tensor(1)):
        expected = noise_and_step(x, step)
        with torch.autocast("cpu", BF16):
            assert all(map(torch.equal, compiled(x, step), expected))
        assert all(value.dtype == FP32 for value in expected)


def test_automatic_choice(monkeypatch):
    """Catches: the slow reference where the native op can run; a gradient that is lost where it cannot."""
    arguments = step_inputs((2, 3, 4), "cpu")
    expected = functional.diffusion_step(**arguments, impl="fused")
    assert all(map(torch.equal, functional.diffusion_step(**arguments), expected))
    arguments["x"].requires_grad_()
    functional.diffusion_step(**arguments)[0].sum().backward()
    assert arguments["x"].grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match='impl="fused": diffusion_step has no fused gradient'):
        functional.diffusion_step(**arguments, impl="fused")


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0), (2, 0, 4)])
def test_empty(shape):
    """Catches: a division by the batch, memory that is read although there is none."""
    arguments = step_inputs(shape, "cpu", **EVERYTHING)
    assert all(value.shape == shape for value in functional.diffusion_step(**arguments, impl="fused"))
    seeds = torch.arange(shape[0])
    ones = torch.ones(shape[0])
    x_t, noise = functional.add_noise(torch.empty(shape), ones, ones, seeds=seeds, impl="fused")
    assert x_t.shape == noise.shape == functional.sample_noise(seeds, 0, shape).shape == shape


def test_raw_ops_refuse_float64():
    """Catches: uninitialised memory as the result of a dtype that no loop was compiled for."""
    functional.sample_noise(torch.tensor([1]), 0, (1, 2))
    ops, x, ones = torch.ops.dalle2_fast, torch.zeros(1, 2, dtype=torch.float64), torch.ones(1)
    for call in (
        lambda: ops.sample_noise(torch.tensor([1]), None, 0, (1, 2), torch.float64),
        lambda: ops.add_noise(x, ones, ones, x.float()),
        lambda: ops.add_noise(x.float(), ones, ones, x),
        lambda: ops.diffusion_step(
            x.float(), x, TABLE, None, 0, None, None, None, 0.0, "epsilon", None, None, False, None
        ),
    ):
        with pytest.raises(TypeError, match="expected float32, bfloat16 or float16, got torch.float64"):
            call()


def test_triton_is_not_needed():
    """Catches: an import of triton by a module that the CPU needs."""
    functional.sample_noise(torch.tensor([1]), 0, (1, 2))
    for name in ("_op", "_planes", "diffusion.op", "diffusion.native"):
        assert "triton" not in vars(sys.modules[f"dalle2_fast.kernels.{name}"])
