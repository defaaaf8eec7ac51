"""Every op and loss under forward-mode derivatives and the transforms of torch.func.

Most kernels have rules for reverse mode only. So "auto" takes the reference there, and "fused" raises. The
kernels that have a rule for one level of forward mode are in test_forward_mode.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from dalle2_fast import functional
from dalle2_fast.losses import ClipLoss, SigLipLoss, SoftClipLoss
from dalle2_fast.modules import GroupNormSiLU
from dalle2_fast.ops import _dispatch
from tests.ops.test_dispatch import on_cuda

SEEDS = torch.tensor([3, 4])
MASK = torch.tensor([[True, True, False, False, True], [False] * 5])
TABLE = torch.tensor([[0.9, 0.4, 0.3, 0.6, 0.1, 0.2, -4.0, -1.0]], dtype=torch.float64).expand(2, 8)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def cases(impl="auto"):
    """name -> (function of tensors, these tensors)."""
    text, x, q, k = draw(5, 3), draw(2, 4, 3, 3), draw(2, 2, 3, 4), draw(2, 2, 5, 4)
    features = draw(5, 3).flip(0), torch.tensor(3.0, dtype=torch.float64)
    bias = torch.tensor(-1.0, dtype=torch.float64)
    norm = (x, draw(4), draw(2, 4))
    options = dict(seeds=SEEDS, guidance=2.0, guidance_rescale=0.5, dynamic_threshold=0.9, impl=impl)

    def silu(x, weight, scale):
        return functional.group_norm_silu(x, 2, weight, None, scale=scale, shift=scale, impl=impl)

    return {
        "contrastive_loss": (lambda i, s: functional.contrastive_loss(i, text, s, impl=impl), features),
        "sigmoid_loss": (lambda i, s: functional.sigmoid_loss(i, text, s, bias, impl=impl), features),
        "soft_contrastive_loss": (lambda i, s: functional.soft_contrastive_loss(i, text, s, impl), features),
        "ClipLoss": (lambda i, s: ClipLoss(impl=impl)(i, text, s), features),
        "SigLipLoss": (lambda i, s: SigLipLoss(impl=impl)(i, text, s, bias), features),
        "SoftClipLoss": (lambda i, s: SoftClipLoss(impl=impl)(i, text, s), features),
        "group_norm_silu": (silu, norm),
        "group_norm_silu, channels_last": (silu, (x.to(memory_format=torch.channels_last), *norm[1:])),
        "cross_attention": (lambda q, k: functional.cross_attention(q, k, k, impl=impl), (q, k)),
        "cross_attention, masked": (
            lambda q, k: functional.cross_attention(q, k, k, MASK, impl=impl), (q, k)),
        "cross_attention, image keys": (
            lambda q, k: functional.cross_attention(q, k, k, MASK, q, q, impl=impl), (q, k)),
        "add_noise": (lambda x, a: functional.add_noise(x, a, a, seeds=SEEDS, impl=impl)[0], (x, draw(2))),
        "diffusion_step": (
            lambda x, output: functional.diffusion_step(x, output, TABLE, 1, **options)[0],
            (x, draw(4, 4, 3, 3))),
        "diffusion_step, step on the device": (
            lambda x, output: functional.diffusion_step(x, output, TABLE, SEEDS[:1] - 3, impl=impl)[0],
            (x, draw(2, 4, 3, 3))),
    }  # fmt: skip


CASES = list(cases())
HAVE_A_TANGENT = ("group_norm_silu", "add_noise", "cross_attention")


@pytest.fixture(autouse=True)
def losses_of_any_size_are_fused(monkeypatch):
    monkeypatch.setattr(_dispatch, "MIN_FUSED_LOGITS", 0)


def reverse(function, inputs, weight):
    """The gradients of sum(weight * output) by ordinary autograd."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    return torch.autograd.grad((function(*leaves) * weight).sum(), leaves)


@pytest.mark.parametrize("case", CASES)
def test_a_tangent_agrees_with_reverse_mode(case):
    # Catches: a kernel without a forward rule, whose tangent is silently 0.
    function, inputs = cases()[case]
    tangents = tuple(draw(*value.shape).flip(0) if value.dim() else value * 0.1 for value in inputs)
    output, tangent = jvp(function, inputs, tangents)
    weight = draw(*output.shape)
    expected = sum((g * t).sum() for g, t in zip(reverse(function, inputs, weight), tangents, strict=True))
    torch.testing.assert_close((weight * tangent).sum(), expected)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, tangents)
        torch.testing.assert_close(forward_ad.unpack_dual(function(*duals)).tangent, tangent)
    torch.testing.assert_close(output, function(*inputs))


@pytest.mark.parametrize("case", CASES)
def test_transforms_of_torch_func(case):
    # Catches: 'must override the setup_context staticmethod'.
    function, inputs = cases()[case]
    everything = tuple(range(len(inputs)))
    gradient = grad(lambda *values: function(*values).sum(), everything)
    expected = reverse(function, inputs, 1.0)
    torch.testing.assert_close(gradient(*inputs), expected)
    two = tuple(torch.stack([value, 0.5 * value]) for value in inputs)
    for actual, first in zip(vmap(gradient)(*two), expected, strict=True):
        torch.testing.assert_close(actual[0], first)
    torch.testing.assert_close(vmap(function)(*two)[1], function(*(0.5 * value for value in inputs)))
    torch.testing.assert_close(jacfwd(function, everything)(*inputs), jacrev(function, everything)(*inputs))
    assert hessian(lambda *values: function(*values).sum())(*inputs).isfinite().all()


@pytest.mark.parametrize("case", ["contrastive_loss", "group_norm_silu", "cross_attention"])
def test_transforms_inside_a_compiled_function(case):
    # Catches: a question at run time that the compiler cannot trace, or that it answers for all time.
    function, inputs = cases()[case]

    def plain_and_tangent(*values):
        return function(*values), jvp(function, values, values)[1]

    compiled = torch.compile(plain_and_tangent, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), plain_and_tangent(*inputs))


@pytest.mark.parametrize("case", [name for name in CASES if ", " not in name])
def test_fused_raises(case, kernel_device):
    # Catches: "fused" that gives a tangent of 0, or another implementation than was asked for.
    if "oss" in case and _dispatch._native.WHY_ABSENT is not None:
        pytest.skip("needs dalle2_fast._C")
    function, inputs = cases("fused")[case]
    inputs = tuple(value.float() for value in inputs)
    message = 'impl="fused": this kernel has (a rule for one level of|no rule for) forward'
    calls = [
        lambda: grad(lambda *values: function(*values).sum())(*inputs),
        lambda: vmap(function)(*(value[None] for value in inputs)),
        lambda: jacfwd(function)(*inputs),
    ]
    if case not in HAVE_A_TANGENT:
        calls.append(lambda: jvp(function, inputs, inputs))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            function(*map(forward_ad.make_dual, inputs, inputs))
    for call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_auto_on_a_gpu_takes_the_reference_while_a_transform_is_active(monkeypatch):
    half = on_cuda(monkeypatch)
    assert not _dispatch.use_reference("auto", half)
    with forward_ad.dual_level():
        assert _dispatch.use_reference("auto", half)
        assert not _dispatch.use_reference("auto", half, forward_mode=True)
    grad(lambda x: x if _dispatch.use_reference("auto", half, forward_mode=True) else None)(torch.ones(()))
    assert not _dispatch.use_reference("auto", half)


def test_the_soft_targets_have_no_tangent():
    # Catches: torch.no_grad() around the targets, which lets tangents through.
    function, inputs = cases()["soft_contrastive_loss"]
    torch.testing.assert_close(jacfwd(function)(*inputs), jacrev(function)(*inputs))


def test_gradients_of_each_sample_through_a_module():
    norm, x = GroupNormSiLU(2, 4), draw(3, 4, 5, 5).float()
    parameters = dict(norm.named_parameters())

    def loss(parameters, sample):
        return functional_call(norm, parameters, (sample[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    norm(x).square().sum().backward()
    for name, value in norm.named_parameters():
        torch.testing.assert_close(each[name].sum(0), value.grad)
