"""Tangents that kernels compute (group_norm_silu, add_noise), in Triton's interpreter and in dalle2_fast._C.

The truth is the reference in float64 under torch.func.jvp, the yardstick ordinary torch at the test's dtype.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp

from dalle2_fast import functional
from dalle2_fast.models.unet.blocks import ResBlock
from dalle2_fast.ops import _dispatch, _native
from tests.support.norm_cases import BF16, FP16, FP32, NCHW, NDHWC, NHWC, PARAMETERS, make, plain_norm
from tests.support.truth import assert_close_to_truth

SEEDS = torch.tensor([3, 4])


@pytest.fixture(params=["triton", "native"])
def kernels(request):
    """The device of the kernels: Triton's, or those of dalle2_fast._C."""
    if request.param == "triton":
        return request.getfixturevalue("kernel_device")
    if _native.WHY_ABSENT is not None:
        pytest.skip(_native.WHY_ABSENT)
    return "cpu"


@pytest.fixture
def chunks(kernels, monkeypatch):
    """chunks() cuts slabs of Triton's kernels into chunks, with small tiles and a small part of one tile."""

    def choose() -> None:
        if not _dispatch._INTERPRETED:
            return
        from dalle2_fast.kernels.group_norm_silu import _plan as plan

        for name, value in dict(LOOPED_BYTES=0, SUM_LANES=64, COLUMN_PROGRAMS=8, ROW_PROGRAMS=8).items():
            monkeypatch.setattr(plan, name, value)
        monkeypatch.setattr(plan.View, "int64_offsets", True)
        for cache in (plan.chunk_tiles, plan.sum_tiles):
            cache.cache_clear()

    yield choose
    if _dispatch.HAS_TRITON:
        from dalle2_fast.kernels.group_norm_silu import _plan as plan

        for cache in (plan.chunk_tiles, plan.sum_tiles):
            cache.cache_clear()


def value_and_tangent(function, inputs, tangents, dtype, impl):
    """`function` at `inputs` along `tangents`; x has this dtype, the others too unless a kernel runs."""

    def cast(values):
        return {
            name: value.to(dtype) if name == "x" or impl != "fused" else value
            for name, value in values.items()
        }  # fmt: skip

    inputs, tangents = cast(inputs), cast(tangents)
    fixed = {name: value for name, value in inputs.items() if name not in tangents}

    def of_moving(*values):
        return function(**dict(zip(tangents, values, strict=True)), **fixed)

    moving = tuple(inputs[name] for name in tangents)
    return dict(zip(("y", "dy"), jvp(of_moving, moving, tuple(tangents.values())), strict=True))


NORM_CASES = [
    # slabs, shape, groups, layout, dtype, given, with tangents, activation
    ("whole", (2, 6, 5, 3), 2, NCHW, FP32, PARAMETERS, ("x", *PARAMETERS), "silu"),
    ("whole", (2, 10, 3, 3), 5, NHWC, FP32, PARAMETERS, ("x", "scale", "shift"), "silu"),
    ("whole", (2, 20, 4, 4), 2, NCHW, FP16, ("scale",), ("x", "scale"), "silu"),
    ("whole", (1, 40, 4, 2), 8, NHWC, BF16, ("weight", "bias"), ("x", "weight", "bias"), None),
    ("whole", (2, 6, 7), 2, NCHW, FP32, (), ("x",), None),
    ("whole", (2, 6, 7), 2, NCHW, FP32, ("bias", "scale"), ("scale",), "silu"),  # x has no tangent
    ("whole", (1, 6, 3, 2, 2), 2, NDHWC, FP32, ("weight", "shift"), ("x", "shift"), "silu"),
    ("chunks", (2, 6, 9, 7), 2, NCHW, FP32, PARAMETERS, ("x", *PARAMETERS), "silu"),
    ("chunks", (1, 20, 5, 5), 4, NHWC, FP16, PARAMETERS, ("x", "scale", "shift"), "silu"),
    ("chunks", (1, 80, 3, 3), 1, NHWC, FP32, ("weight",), ("x",), None),  # several tiles of channels
]


@pytest.mark.parametrize("slabs, shape, groups, layout, dtype, given, moving, activation", NORM_CASES)
def test_tangent_of_the_norm(
    kernels, chunks, slabs, shape, groups, layout, dtype, given, moving, activation
):  # fmt: skip
    """Catches: a term of the tangent left out or taken twice, a wrong mask, group or stride."""
    if slabs == "chunks":
        chunks()
    made = make(shape, kernels, layout=layout)
    inputs = {name: made[name] for name in ("x", *given)}
    generator = torch.Generator().manual_seed(5)
    tangents = {
        name: (torch.randn(inputs[name].shape, generator=generator) + 0.5).to(kernels) for name in moving
    }
    tangents = {name: value.to(dtype).float() if name == "x" else value for name, value in tangents.items()}
    inputs["x"] = inputs["x"].to(dtype).float()

    def norm(impl):
        return lambda **given: functional.group_norm_silu(
            num_groups=groups, activation=activation, impl=impl, **given
        )

    actual = value_and_tangent(norm("fused"), inputs, tangents, dtype, "fused")
    truth = value_and_tangent(norm("reference"), inputs, tangents, torch.float64, "reference")
    plain = value_and_tangent(
        lambda **given: plain_norm(groups, activation, **given),
        {key: value.contiguous() for key, value in inputs.items()}, tangents, dtype, "plain",
    )  # fmt: skip
    assert_close_to_truth(actual, plain, truth)
    assert actual["dy"].dtype == dtype and actual["dy"].stride() == actual["y"].stride()


def test_tangent_of_another_layout(kernels, chunks):
    """Catches: a tangent of x that is read as if it lay like x."""
    inputs = make((1, 4, 3, 4), kernels)
    x, dx = inputs["x"], torch.randn(1, 4, 3, 4, generator=torch.Generator().manual_seed(1)).to(kernels)
    for slabs in ("whole", "chunks"):
        if slabs == "chunks":
            chunks()
        for other in (dx.to(memory_format=NHWC), dx.mT.contiguous().mT, dx[:, :, :1, :1].expand(x.shape)):
            results = (
                jvp(lambda x, impl=impl: functional.group_norm_silu(x, 2, impl=impl), (x,), (other,))[1]
                for impl in ("fused", "reference")
            )
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "drawn, moving, dtype",
    [
        (True, ("x",), FP32),
        (True, ("alpha", "sigma"), BF16),
        (False, ("alpha",), FP32),
        (False, ("x", "sigma"), BF16),
        (False, ("noise",), FP32),
    ],
)
def test_tangent_of_add_noise(kernels, drawn, moving, dtype):
    """Catches: one of both terms of a product's derivative left out; a tangent along drawn noise."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (2, 3, 5), "alpha": (2,), "sigma": (2,), "noise": (2, 3, 5)}
    inputs, tangents = (
        {name: torch.randn(shape, generator=generator).to(dtype).float().to(kernels)
         for name, shape in shapes.items()}
        for _ in range(2)
    )  # fmt: skip
    seeds = SEEDS.to(kernels)
    if drawn:
        given = functional.sample_noise(seeds, 0, (2, 3, 5), dtype=dtype)
        inputs["noise"] = given.float()

    def noised(impl):
        def call(x, alpha, sigma, noise):
            source = dict(seeds=seeds) if drawn and impl == "fused" else dict(noise=noise.to(x.dtype))
            return functional.add_noise(x, alpha, sigma, impl=impl, **source)[0]

        return call

    tangents = {name: tangents[name] for name in moving}
    actual = value_and_tangent(noised("fused"), inputs, tangents, dtype, "fused")
    plain = value_and_tangent(noised("reference"), inputs, tangents, dtype, "reference")
    truth = value_and_tangent(noised("reference"), inputs, tangents, torch.float64, "reference")
    assert_close_to_truth(actual, plain, truth)


def small_network(impl):
    torch.manual_seed(0)
    block = ResBlock(4, 8, embed_dim=6, num_groups=2, film=True)
    torch.nn.init.normal_(block.conv2.weight, std=0.2)
    for norm in (block.norm1, block.norm2):
        norm.impl = impl
    return block


def mean_flow_step(network, x, embed, velocity, embed_rate, interface):
    """Loss of a step of MeanFlow (Geng et al., 2505.13447, equation 9), whose target is a stopped tangent."""
    if interface == "torch.func":
        u, du = jvp(network, (x, embed), (velocity, embed_rate))
    else:
        with forward_ad.dual_level():
            dual = network(forward_ad.make_dual(x, velocity), forward_ad.make_dual(embed, embed_rate))
            u, du = forward_ad.unpack_dual(dual)
    target = torch.cat([velocity, velocity], dim=1) - 0.3 * du.detach()
    loss = (u - target).square().mean()
    loss.backward()
    return loss, du


@pytest.mark.parametrize("interface", ["torch.func", "forward_ad"])
def test_a_step_of_mean_flow(kernels, interface, monkeypatch):
    """Catches: gradients of the parameters that are lost or wrong after a tangent was computed."""
    calls = []
    entry = _dispatch.kernel
    monkeypatch.setattr(_dispatch, "kernel", lambda name: calls.append(name) or entry(name))
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(s, generator=generator) for s in ((2, 4, 4, 4), (2, 6), (2, 4, 4, 4), (2, 6))]
    fused, truth = small_network("fused").to(kernels), small_network("reference").double()
    loss, tangent = mean_flow_step(fused, *(value.to(kernels) for value in data), interface)
    expected, true_tangent = mean_flow_step(truth, *(value.double() for value in data), interface)
    assert calls == ["group_norm_silu"] * 2
    torch.testing.assert_close(loss.double().cpu(), expected)
    torch.testing.assert_close(tangent.double().cpu(), true_tangent, rtol=1e-5, atol=1e-5)
    for (name, value), true in zip(fused.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(value.grad.double().cpu(), true.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_equal_bits(kernels):
    """Catches: sums in an order that differs from run to run."""
    inputs = make((1, 8, 5, 5), kernels, layout=NHWC)

    def tangent():
        return jvp(lambda x: functional.group_norm_silu(x, 4, impl="fused"), (inputs["x"],), (inputs["x"],))[
            1
        ]

    first = tangent()
    assert all(torch.equal(tangent(), first) for _ in range(2))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0)])
def test_empty(kernels, shape):
    """Catches: a launch of no program, and a tangent of another shape."""
    x = torch.empty(shape, device=kernels)
    y, tangent = jvp(lambda x: functional.group_norm_silu(x, 2, impl="fused"), (x,), (x,))
    assert y.shape == tangent.shape == shape


def test_what_is_not_differentiated_again_says_so(kernels):
    """Catches: forward over reverse mode whose tangent is silently 0, and such a gradient of a tangent."""
    x = make((1, 4, 2, 2), kernels)["x"].requires_grad_()
    _, tangent = jvp(lambda x: functional.group_norm_silu(x, 2, impl="fused"), (x,), (x.detach(),))
    with pytest.raises(NotImplementedError, match="group_norm_silu: the kernel has no second derivative"):
        tangent.sum().backward()
    with forward_ad.dual_level():
        y = functional.group_norm_silu(forward_ad.make_dual(x, x.detach()), 2, impl="fused")
        with pytest.raises(NotImplementedError, match="no derivative of its gradient .forward over reverse"):
            torch.autograd.grad(y.sum(), x)


def test_opcheck(kernels):
    """Catches: a wrong schema, and a fake that lies about shape, dtype or strides."""
    assert _dispatch.load_kernels(torch.device(kernels)) is None
    x = make((1, 4, 2, 2), kernels, layout=NHWC)["x"]
    film, statistics = x[:, :, 0, 0].contiguous(), torch.ones(1, 2, device=kernels)
    op = torch.ops.dalle2_fast.group_norm_silu_tangent.default
    arguments = (x, x, statistics, statistics, film[0], film[0], film, film, film, film, True)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
