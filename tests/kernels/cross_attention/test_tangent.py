"""The tangent of the attention kernels against the reference in float64 under torch.func.jvp."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp

from dalle2_fast import functional
from dalle2_fast.ops import _native
from tests.ops.test_cross_attention import make
from tests.support.truth import assert_close_to_truth

pytest.importorskip("triton")

ALL = ("q", "context_k", "context_v", "image_k", "image_v")
NETWORK = ("q", "image_k", "image_v")  # of a network whose context is constant


def value_and_tangent(impl, inputs, tangents, dtype, **options):
    """{"out": ..., "tangent": ...} of cross_attention at `inputs` along `tangents`."""

    def cast(values):
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}

    inputs, tangents = cast(inputs), cast(tangents)

    def attend(*moving):
        given = inputs | dict(zip(tangents, moving, strict=True))
        return functional.cross_attention(impl=impl, **given, **options)

    moving = tuple(inputs[name] for name in tangents)
    return dict(zip(("out", "tangent"), jvp(attend, moving, tuple(tangents.values())), strict=True))


def tangents_of(inputs, names, mean=0.0):
    torch.manual_seed(1)
    return {name: torch.randn(x.shape).to(x.device) + mean for name, x in inputs.items() if name in names}


def compare(inputs, tangents, dtype, device, **options):
    inputs, tangents = ({k: v.to(device) for k, v in values.items()} for values in (inputs, tangents))
    truth = value_and_tangent("reference", inputs, tangents, torch.float64, **options)
    plain = value_and_tangent("reference", inputs, tangents, dtype, **options)
    actual = value_and_tangent("fused", inputs, tangents, dtype, **options)
    assert_close_to_truth(actual, plain, truth, slack=4e-6 if device == "cuda" else 1e-6)
    assert actual["tangent"].dtype == dtype
    assert actual["tangent"].stride() == actual["out"].stride()


CASES = [
    # B, H, T, S, T2, D, names of the tangents
    ((2, 1, 40, 13, 0, 32), ALL),
    ((2, 2, 33, 40, 70, 20), ALL),  # both kinds of keys, several tiles of each, columns past D
    ((1, 2, 70, 20, 33, 16), NETWORK),
    ((1, 1, 9, 130, 0, 80), ("context_k",)),  # q, and v, without a tangent
    ((2, 1, 9, 35, 0, 64), ("context_v",)),
    ((1, 1, 5, 7, 3, 128), ("q",)),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape, names", CASES)
def test_is_close_to_truth(shape, names, masked, kernel_device):
    """Catches: a product left out or taken twice, a running mean that is not that of all keys, a partial tile
    that counts."""
    inputs = make(*shape, masked=masked)
    compare(inputs, tangents_of(inputs, names), torch.float32, kernel_device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, kernel_device):
    """Catches: sums in the dtype of the inputs."""
    inputs = make(1, 2, 20, 40, 33, 32, masked=True)
    compare(inputs, tangents_of(inputs, ALL), dtype, kernel_device)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_any_scale(scale, kernel_device):
    """Catches: a negative scale that is lost in one of both products."""
    inputs = make(1, 1, 9, 7, 8, 16, masked=True)
    compare(inputs, tangents_of(inputs, ALL), torch.float32, kernel_device, softmax_scale=scale)


def test_scores_that_move_together(kernel_device):
    """Catches: sum p s' v - m out, two large sums that cancel: all s' are near 3000."""
    inputs = make(1, 1, 20, 100, 0, 16)
    inputs["context_k"] += 30.0
    compare(inputs, tangents_of(inputs, ("q",), mean=25.0), torch.float32, kernel_device)


def test_masked_keys_may_be_nan(kernel_device):
    """Catches: 0 * NaN in any of both sums; a row without keys whose tangent is not 0."""
    inputs = make(2, 1, 5, 40, 0, 16, masked=True)
    tangents = tangents_of(inputs, ALL)
    dropped = ~inputs["context_mask"][:, None, :, None]
    inputs, tangents = ({k: v.to(kernel_device) for k, v in x.items()} for x in (inputs, tangents))
    clean = value_and_tangent("fused", inputs, tangents, torch.float32)
    for name in ("context_k", "context_v"):
        for values in (inputs, tangents):
            values[name] = values[name].masked_fill(dropped.to(kernel_device), float("nan"))
    found = value_and_tangent("fused", inputs, tangents, torch.float32)
    for name, value in clean.items():
        assert torch.equal(found[name], value), name
    assert torch.count_nonzero(found["tangent"][1]) == 0  # the mask of this sample has no key


def test_tangents_of_another_layout(kernel_device):
    """Catches: a tangent that is read with the strides of its primal; expanded zeros."""
    inputs = {name: x.to(kernel_device) for name, x in make(1, 2, 9, 7, 0, 16).items()}
    for change in (lambda x: x.mT.contiguous().mT, lambda x: x[:, :, :1, :1].expand(x.shape)):
        tangents = {name: change(x) for name, x in tangents_of(inputs, ALL).items()}
        found, expected = (
            value_and_tangent(impl, inputs, tangents, torch.float32) for impl in ("fused", "reference")
        )
        torch.testing.assert_close(found["tangent"], expected["tangent"], rtol=1e-4, atol=1e-5)


def small_network(impl, image):
    """Queries and values are linear layers of x, as in a U-Net."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(16, 16) for name in ("q", "k", "v")})
    context = torch.randn(2, 2, 7, 16, generator=torch.Generator().manual_seed(3))

    def network(x, time):
        q, k, v = (layers[name](x * time) for name in ("q", "k", "v"))
        keys = context.to(x)
        extra = dict(image_k=k, image_v=v) if image else {}
        return functional.cross_attention(q, keys, keys * time, impl=impl, **extra)

    return layers, network


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("interface", ["torch.func", "forward_ad"])
def test_a_step_of_mean_flow(interface, image, kernel_device):
    """Catches: gradients of parameters that are lost or wrong after a tangent was computed (MeanFlow, Geng et
    al., 2505.13447, equation 9: the target is a stopped tangent). float16 without an image: the short form,
    which recomputes its softmax."""
    dtype = torch.float32 if image else torch.float16
    generator = torch.Generator().manual_seed(2)
    x, velocity = torch.randn(2, 2, 2, 5, 16, generator=generator).to(kernel_device)
    time = torch.tensor([0.7, 0.2], device=kernel_device)[:, None, None, None]

    def step(impl, dtype):
        layers, network = small_network(impl, image)
        layers.to(kernel_device, dtype)
        at, along = (x.to(dtype), time.to(dtype)), (velocity.to(dtype), torch.ones_like(time).to(dtype))
        if interface == "torch.func":
            u, du = jvp(network, at, along)
        else:
            with forward_ad.dual_level():
                u, du = forward_ad.unpack_dual(network(*map(forward_ad.make_dual, at, along)))
        (u - (velocity.to(dtype) - 0.5 * du.detach())).square().sum().backward()
        # Without image keys the layers of keys and values take no part.
        gradients = {f"d {name}": p.grad for name, p in layers.named_parameters() if p.grad is not None}
        return {"out": u.detach(), "tangent": du.detach(), **gradients}

    actual, plain, truth = step("fused", dtype), step("reference", dtype), step("reference", torch.float64)
    assert len(truth) == (8 if image else 4)
    assert_close_to_truth(actual, plain, truth, slack=4e-6 if kernel_device == "cuda" else 1e-6)


def test_what_is_not_differentiated_again_says_so(kernel_device):
    """Catches: reverse over forward, or forward over reverse mode, that silently lacks a term."""
    q = torch.randn(1, 1, 3, 16, device=kernel_device, requires_grad=True)
    other = torch.randn_like(q)

    def attend(q):
        return functional.cross_attention(q, other, other, impl="fused")

    _, tangent = jvp(attend, (q,), (other,))
    with pytest.raises(NotImplementedError, match="no derivative of its tangent .* detach the tangent"):
        tangent.sum().backward()
    with forward_ad.dual_level():
        out = attend(forward_ad.make_dual(q, other))
        with pytest.raises(NotImplementedError, match="no derivative of its gradient .forward over reverse"):
            torch.autograd.grad(out.sum(), q)
        out = attend(q)  # nothing has a tangent, but what follows has one
        with pytest.raises(NotImplementedError, match="no derivative of its gradient"):
            torch.autograd.grad((out * forward_ad.make_dual(other, other)).sum(), q)


def test_equal_bits_and_nothing_unwritten(kernel_device):
    inputs = {name: x.to(kernel_device) for name, x in make(1, 2, 33, 40, 20, 32, masked=True).items()}
    tangents = tangents_of(inputs, ALL)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        first, second = (value_and_tangent("fused", inputs, tangents, torch.float32) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name in first:
        assert bool(first[name].isfinite().all()) and torch.equal(first[name], second[name]), name


def test_nothing_to_attend_to(kernel_device):
    """Catches: a launch without programs, a division by a total of 0."""
    q, none = torch.randn(1, 2, 3, 16, device=kernel_device), torch.zeros(1, 2, 0, 16, device=kernel_device)
    for values in ((q, none, none), (q[:0], q[:0], q[:0]), (q[:, :, :0], q, q)):
        inputs = dict(zip(ALL, values, strict=False))
        result = value_and_tangent("fused", inputs, {"q": values[0]}, torch.float32)
        assert result["tangent"].shape == values[0].shape and torch.count_nonzero(result["tangent"]) == 0


@pytest.mark.parametrize("image_keys", [0, 3])
def test_registration(image_keys, kernel_device):
    """Catches: a wrong schema; a fake of another shape, dtype or stride."""
    inputs = {name: x.to(kernel_device) for name, x in make(1, 1, 5, 4, image_keys, 16, masked=True).items()}
    value_and_tangent("fused", inputs, tangents_of(inputs, ("q",)), torch.float32)  # loads the op
    values = [inputs.get(name) for name in (*ALL[:3], "context_mask", *ALL[3:])]
    tangents = [inputs.get(name) for name in ALL]
    op = torch.ops.dalle2_fast.cross_attention_jvp.default
    torch.library.opcheck(op, (*values, *tangents, 0.3), test_utils=("test_schema", "test_faketensor"))


def test_a_processor_takes_the_reference():
    """Catches: "fused" that silently runs another implementation on the CPU."""
    if _native.WHY_ABSENT is not None:
        pytest.skip(_native.WHY_ABSENT)
    inputs = make(1, 1, 4, 5, 0, 16)
    tangents = tangents_of(inputs, ALL)
    found, expected = (
        value_and_tangent(impl, inputs, tangents, torch.float32) for impl in ("auto", "reference")
    )
    assert torch.equal(found["tangent"], expected["tangent"])
    with pytest.raises(RuntimeError, match='impl="fused": this kernel has no rule for forward-mode'):
        value_and_tangent("fused", inputs, tangents, torch.float32)
