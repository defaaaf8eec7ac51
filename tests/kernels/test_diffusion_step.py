"""The kernels of diffusion_step against their reference in float64, and what all three noise ops register.

On a machine without a GPU they are interpreted, on tiny shapes; the real shapes run where a GPU is.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dalle2_fast import functional
from dalle2_fast.ops.diffusion_step import quantile_of_rows
from tests.support.diffusion.step_cases import (
    CASES,
    TABLE,
    check_step,
    draw,
    on,
    op_calls,
    step_inputs,
    viewed,
)

pytest.importorskip("triton")

from dalle2_fast.kernels import _planes  # noqa: E402
from dalle2_fast.kernels.diffusion import _statistics  # noqa: E402
from dalle2_fast.kernels.diffusion import noise as add_noise  # noqa: E402
from dalle2_fast.kernels.diffusion import step as diffusion_step  # noqa: E402
from tests.support.aot.cases_diffusion_step import step_launches  # noqa: E402

# ------------------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("name", CASES)
def test_step(name, kernel_device):
    check_step(step_inputs((2, 3, 5, 7), kernel_device, **on(kernel_device, CASES[name])))


# All examples run on the one kernel_device.
@settings(max_examples=10, derandomize=True, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    batch=st.integers(1, 2),
    prediction=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    guidance=st.sampled_from([None, 2.5]),
    quantile=st.sampled_from([None, 0.3, 0.99]),
    learned_range=st.booleans(),
    view=st.sampled_from(["contiguous", "transposed", "strided", "more channels"]),
)
def test_step_of_any_shape_and_strides(
    kernel_device, shape, batch, prediction, guidance, quantile, learned_range, view
):
    arguments = step_inputs(
        (batch, *shape), kernel_device, prediction=prediction, guidance=guidance, dynamic_threshold=quantile,
        learned_range=learned_range, clip=0.3,
    )  # fmt: skip
    check_step({**arguments, "model_output": viewed(arguments["model_output"], view)})


# Larger than what one program holds: the subset, the list and the search in memory.
@pytest.mark.parametrize(
    "shape, quantile, options",
    [
        ((1, 3, 80, 80), 0.995, {"guidance": 2.0, "guidance_rescale": 0.5}),
        ((1, 3, 74, 75), 0.5, {"nhwc": "o", "guidance": 2.0}),
        ((1, 16400), 1.0, {}),
        ((1, 16400), 1e-5, {}),
    ],
)
def test_threshold_of_a_large_sample(shape, quantile, options, kernel_device):
    options = {**options, "dynamic_threshold": quantile, "clip": 1e-6, "seeds": False}
    check_step(step_inputs(shape, kernel_device, **options))


def limits(x0, quantile, kernel_device):
    """The limit that the kernel finds for |x0|, without a bound that hides it."""
    x = torch.zeros_like(x0)
    _, planes = _planes.arrange([x, x0])
    row = _statistics.Row(TABLE.to(kernel_device), None, 0, len(TABLE))
    statistics = _statistics.sample_statistics(
        x, x0, planes, row, guidance=None, guidance_rescale=0.0, prediction="sample", quantile=quantile,
        bound=0.0,
    )  # fmt: skip
    return statistics[:, 1].cpu()


def quantiles(x0, quantile):
    magnitude = x0.cpu().abs()
    return quantile_of_rows(magnitude, quantile)


def test_limit_when_the_subset_misleads(kernel_device):
    # All elements of the subset are small, so the bounds that it gives lie below the wanted rank.
    n = 20000
    x0 = 1 + draw(1, n).abs()
    index = torch.arange(_statistics._SUBSET_KEYS)
    index = (((index * 0x9E3779B9) & 0xFFFFFFFF) * n) >> 32
    x0[0, index] = 1e-3 * draw(len(index), seed=1)
    assert torch.equal(limits(x0.to(kernel_device), 0.8, kernel_device), quantiles(x0, 0.8))


@pytest.mark.parametrize("n", [1, 2, 127, 20000])
def test_limit_with_ties_and_zeros(n, kernel_device):
    x0 = torch.stack((torch.zeros(n), torch.full((n,), -2.5), draw(n).round()))
    for quantile in (0.5, 0.99) if n < 1000 else (0.99,):
        assert torch.equal(limits(x0.to(kernel_device), quantile, kernel_device), quantiles(x0, quantile))


def test_not_finite_stays_not_finite(kernel_device):
    # Catches: a clamp that turns the NaN of a diverged sample into a harmless number.
    options = ({"clip": 1.0}, {"dynamic_threshold": 1.0}, {"dynamic_threshold": 0.5})
    for option in options:
        arguments = step_inputs((2, 3, 2, 2), kernel_device, prediction="sample", seeds=False, **option)
        arguments["model_output"][0, 0, 0, 0] = float("nan")
        arguments["model_output"][1, 1, 0, 0] = -float("inf")
        on_cpu = on("cpu", arguments)
        actual = functional.diffusion_step(**arguments, impl="fused")
        expected = functional.diffusion_step(**on_cpu, impl="reference")
        for value, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(value.cpu(), right, equal_nan=True, rtol=1e-5, atol=1e-6)


EVERYTHING = {**CASES["everything"], "dtype": torch.float32}


def test_a_sample_does_not_depend_on_its_batch_mates(kernel_device):
    # Bit for bit: no statistics, noise or configuration may look at the batch.
    arguments = step_inputs((3, 3, 4, 6), kernel_device, **EVERYTHING)
    together = functional.diffusion_step(**arguments, impl="fused")
    alone = {**arguments, "model_output": arguments["model_output"][2::3]}
    for name in ("x", "previous_x0", "seeds"):
        alone[name] = arguments[name][2:]
    for value, expected in zip(functional.diffusion_step(**alone, impl="fused"), together, strict=True):
        assert torch.equal(value[0], expected[2])


def test_the_launch_grid_does_not_matter(kernel_device, monkeypatch):
    arguments = step_inputs((1, 3, 6, 7), kernel_device, nhwc="o", seeds=True)
    expected = functional.diffusion_step(**arguments, impl="fused")
    noise = torch.ops.dalle2_fast.sample_noise(arguments["seeds"], None, 3, (1, 126), torch.float32)
    for module in (diffusion_step, add_noise):
        monkeypatch.setattr(module, "tile_config", lambda positions: (16, 1))
    for value, right in zip(functional.diffusion_step(**arguments, impl="fused"), expected, strict=True):
        assert torch.equal(value, right)
    again = torch.ops.dalle2_fast.sample_noise(arguments["seeds"], None, 3, (1, 126), torch.float32)
    assert torch.equal(again, noise)


def test_step_and_guidance_as_numbers_or_tensors(kernel_device):
    arguments = step_inputs((2, 3, 3, 3), kernel_device, guidance=2.5)
    expected = functional.diffusion_step(**arguments, impl="fused")
    for change in ({"step": 1}, {"guidance": torch.tensor(2.5)}, {"table": TABLE.double()}):
        changed = {**arguments, **on(kernel_device, change)}
        for value, right in zip(functional.diffusion_step(**changed, impl="fused"), expected, strict=True):
            assert torch.equal(value, right)


def test_autocast_changes_nothing(kernel_device):
    arguments = step_inputs((1, 3, 3, 3), kernel_device, guidance=2.5, clip=1.0)
    one = torch.ones(1, device=kernel_device)
    given = {"x0": arguments["x"], "alpha": one, "sigma": one, "seeds": arguments["seeds"]}

    def both():
        step = functional.diffusion_step(**arguments, impl="fused")
        return *step, *functional.add_noise(**given, impl="fused")

    expected = both()
    with torch.autocast(kernel_device, torch.bfloat16):
        for value, right in zip(both(), expected, strict=True):
            assert value.dtype == torch.float32 and torch.equal(value, right)


def test_empty_tensors_launch_nothing(kernel_device):
    arguments = step_inputs((0, 3, 4, 4), kernel_device, dynamic_threshold=0.9)
    x_next, x0 = functional.diffusion_step(**arguments, impl="fused")
    assert x_next.shape == x0.shape == (0, 3, 4, 4)
    arguments = step_inputs((2, 3, 0), kernel_device)
    assert functional.diffusion_step(**arguments, impl="fused")[0].shape == (2, 3, 0)
    nothing = torch.empty(0, 3, device=kernel_device)
    x_t, _ = functional.add_noise(nothing, nothing[:, 0], nothing[:, 0], nothing, impl="fused")
    assert x_t.shape == (0, 3)


def test_number_of_launches():
    # On meta tensors: a value read back from the device would raise here.
    count = {
        name: len(step_launches((3, 64, 64), **options))
        for name, options in {
            "plain": {}, "all but statistics": {"guided": True, "learned_range": True, "previous": True},
            "rescale": {"guided": True, "rescale": True}, "threshold": {"quantile": 0.9},
            "both": {"guided": True, "rescale": True, "quantile": 0.9, "nhwc": True, "learned_range": True},
        }.items()
    }  # fmt: skip
    assert count == {"plain": 1, "all but statistics": 1, "rescale": 2, "threshold": 2, "both": 2}


def test_gradients_take_the_reference(kernel_device):
    arguments = step_inputs((1, 2, 3), kernel_device)
    arguments["x"].requires_grad_()
    x_next, _ = functional.diffusion_step(**arguments)
    (gradient,) = torch.autograd.grad(x_next.sum(), arguments["x"])
    assert gradient.abs().sum() > 0
    with pytest.raises(RuntimeError, match='impl="fused": diffusion_step has no fused gradient'):
        functional.diffusion_step(**arguments, impl="fused")
    with torch.no_grad():
        functional.diffusion_step(**arguments, impl="fused")


def test_a_sample_too_large_is_refused():
    # Element numbers are int32 in the kernels. On the meta device there is no memory to pay.
    with pytest.raises(ValueError, match=r"x: expected fewer than 2\*\*30 elements per sample"):
        step_launches((1, 2**15, 2**15))


# ----------------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("name", ["sample_noise", "add_noise", "add_drawn_noise", "diffusion_step"])
def test_opcheck(name, kernel_device):
    """Fails on a wrong schema, a fake that lies about shape or strides, or an untraceable gradient."""
    op, arguments, options = op_calls(kernel_device)[name]
    torch.library.opcheck(op.default, arguments, options)


def test_compiles_into_one_graph(kernel_device):
    arguments = step_inputs((2, 2, 3, 3), kernel_device, guidance=torch.tensor(2.0), clip=1.0)
    arguments["guidance"] = arguments["guidance"].to(kernel_device)
    x, seeds = arguments.pop("x"), arguments["seeds"]

    def noise_and_step(x, step):
        x_t, _ = functional.add_noise(x, x[:, 0, 0, 0], x[:, 0, 0, 0], seeds=seeds, step=step, impl="fused")
        with torch.no_grad():
            return x_t, *functional.diffusion_step(x, **{**arguments, "step": step}, impl="fused")

    compiled = torch.compile(noise_and_step, fullgraph=True, backend="aot_eager")
    for step in (0, 1):
        number = torch.tensor(step, device=kernel_device)
        for value, right in zip(compiled(x, number), noise_and_step(x, number), strict=True):
            assert torch.equal(value, right)


# --------------------------------------------------------------------------------------------------- on a GPU

REAL = {
    "decoder": ((3, 3, 64, 64), {"guidance": 3.0, "learned_range": True, "clip": 1.0}),
    "decoder nhwc": ((3, 3, 64, 64), {"guidance": 3.0, "learned_range": True, "clip": 1.0, "nhwc": "o"}),
    "decoder dynamic": (
        (3, 3, 64, 64), {"guidance": 3.0, "guidance_rescale": 0.7, "dynamic_threshold": 0.995},
    ),
    "upsampler": ((3, 3, 256, 256), {"learned_range": True, "clip": 1.0}),
    "upsampler dynamic": ((3, 3, 256, 256), {"guidance": 3.0, "dynamic_threshold": 0.995}),
    "upsampler dynamic nhwc": ((3, 3, 256, 256), {"guidance": 3.0, "dynamic_threshold": 0.9, "nhwc": "o"}),
    "second upsampler dynamic": ((1, 3, 1024, 1024), {"dynamic_threshold": 0.995}),
    "prior": ((3, 768), {"guidance": 2.0, "prediction": "sample"}),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REAL)
def test_real_shapes(name, dtype):
    shape, options = REAL[name]
    check_step(step_inputs(shape, "cuda", dtype=dtype, **options))


@pytest.mark.gpu
def test_one_graph_serves_every_step():
    # Catches: a wait for the device, and a step, guidance or seed that is frozen into the launch.
    arguments = step_inputs((2, 3, 64, 64), "cuda", guidance=torch.tensor(3.0, device="cuda"),
                            guidance_rescale=0.5, dynamic_threshold=0.99, learned_range=True)  # fmt: skip
    functional.diffusion_step(**arguments, impl="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = functional.diffusion_step(**arguments, impl="fused")
    for step, guidance in ((0, 1.0), (2, 7.0)):
        arguments["step"].fill_(step)
        arguments["guidance"].fill_(guidance)
        arguments["seeds"].add_(1)
        graph.replay()
        for value, right in zip(captured, functional.diffusion_step(**arguments, impl="fused"), strict=True):
            assert torch.equal(value, right)


@pytest.mark.gpu
def test_no_new_kernel_when_batch_step_or_guidance_change():
    counts = []
    for batch, step, guidance in ((2, 0, 2.0), (2, 1, 7.5), (1, 2, 1.0), (3, 1, 0.0)):
        arguments = step_inputs((batch, 3, 64, 64), "cuda", guidance=guidance, clip=1.0)
        functional.diffusion_step(**{**arguments, "step": step}, impl="fused")
        counts.append(sum(len(cache[0]) for cache in diffusion_step._step_kernel.device_caches.values()))
    assert len(set(counts)) == 1, counts
