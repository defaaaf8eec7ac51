"""Empty tensors, groups of one value, scalars of another dtype, and tensors without strides, for every op."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast import functional
from dalle2_fast.ops import _native

SEEDS = torch.tensor([3, 4])
LOSSES = ("contrastive_loss", "sigmoid_loss", "soft_contrastive_loss")
IMPLS = ("reference", "fused")


def empty_cases():
    """name -> (function of (tensors, impl), tensors of which some are empty)."""

    def attend(q, k, v, image_k=None, image_v=None, *, impl):
        return functional.cross_attention(q, k, v, None, image_k, image_v, impl=impl)

    def norm(x, weight, bias, scale, shift, *, impl):
        return functional.group_norm_silu(x, 2, weight, bias, 1e-5, scale, shift, impl=impl)

    def add_noise(x0, alpha, sigma, noise, *, impl):
        return functional.add_noise(x0, alpha, sigma, noise, impl=impl)[0]

    def add_drawn_noise(x0, alpha, sigma, *, impl):
        return functional.add_noise(x0, alpha, sigma, seeds=SEEDS[: x0.shape[0]], impl=impl)[0]

    def heads(batch, length):
        return torch.randn(batch, 2, length, 8)

    def of_norm(batch, *positions):
        return [torch.randn(batch, 4, *positions), torch.randn(4), torch.randn(4), *torch.randn(2, batch, 4)]

    cases = {}
    for b, t, s, t2 in ((2, 3, 5, 0), (2, 3, 0, 5), (2, 3, 0, 0), (2, 0, 5, 5), (0, 3, 5, 5), (2, 3, 130, 0)):
        inputs = [heads(b, t), heads(b, s), heads(b, s), heads(b, t2), heads(b, t2)]
        cases[f"cross_attention {b} {t} {s} {t2}"] = attend, inputs
    cases["cross_attention 2 3 0"] = attend, [heads(2, 3), heads(2, 0), heads(2, 0)]
    for shape in ((0, 3), (2, 0), (2, 0, 3)):
        cases[f"group_norm_silu {shape}"] = norm, of_norm(*shape)
    for shape in ((0, 3), (2, 0)):
        two = torch.rand(2, shape[0])
        cases[f"add_noise {shape}"] = add_noise, [torch.randn(shape), *two, torch.randn(shape)]
        cases[f"add_noise by seed {shape}"] = add_drawn_noise, [torch.randn(shape), *two]
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", empty_cases())
def test_gradients_of_empty_tensors(name, impl, dtype, kernel_device):
    # Catches: a gradient of another shape than its tensor, or none.
    function, inputs = empty_cases()[name]
    leaves = [value.to(kernel_device, dtype).requires_grad_() for value in inputs]
    output = function(*leaves, impl=impl)
    expected = function(*leaves, impl="reference")
    assert output.shape == expected.shape and output.dtype == expected.dtype
    gradients, truth = (torch.autograd.grad(value.sum(), leaves) for value in (output, expected))
    for leaf, gradient, value in zip(leaves, gradients, truth, strict=True):
        assert gradient.shape == leaf.shape
        torch.testing.assert_close(gradient, value, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_attend_to_under_autocast(impl, kernel_device):
    # Catches: the dtype of q where the autocast dtype is promised. q may even be infinite.
    q, none = torch.full((1, 1, 2, 8), float("inf")), torch.zeros(1, 1, 0, 8)
    q, none = q.to(kernel_device).requires_grad_(), none.to(kernel_device)
    with torch.autocast(kernel_device, torch.bfloat16):
        out = functional.cross_attention(q, none, none, impl=impl)
    assert out.dtype == torch.bfloat16 and torch.count_nonzero(out) == 0
    assert torch.count_nonzero(torch.autograd.grad(out.sum(), q)[0]) == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (1, 4, 1, 1)])
def test_one_value_per_group(shape, impl, kernel_device):
    # Catches: torch's "Expected more than 1 value per channel". A value less its mean is 0.
    x = torch.randn(shape, device=kernel_device, requires_grad=True)
    weight, bias = torch.randn(2, 4, device=kernel_device).requires_grad_()
    y = functional.group_norm_silu(x, 4, weight, bias, activation=None, impl=impl)
    expected = bias.reshape(4, *(1,) * (len(shape) - 2)).expand(shape)
    close = dict(rtol=0, atol=3e-4)  # torch subtracts x * eps ** -0.5 from itself
    torch.testing.assert_close(y, expected, **close)
    dx, d_weight, d_bias = torch.autograd.grad(y.sum(), (x, weight, bias))
    torch.testing.assert_close(dx, torch.zeros_like(dx), **close)
    torch.testing.assert_close(d_weight, torch.zeros_like(d_weight), **close)
    torch.testing.assert_close(d_bias, torch.full_like(d_bias, shape[0]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", LOSSES)
def test_scalars_do_not_change_the_dtype_of_a_loss(op, impl):
    # Catches: a scale [1] in float64, which promotes the logits where a scalar [] does not.
    if impl == "fused" and _native.WHY_ABSENT is not None:
        pytest.skip("needs dalle2_fast._C")
    features, loss = torch.eye(4), getattr(functional, op)
    for dtype in (torch.float64, torch.bfloat16):
        scale = torch.full((1,), 2.0, dtype=dtype, requires_grad=True)
        bias = {} if op == "soft_contrastive_loss" else {"logit_bias": torch.full((1,), -1.0, dtype=dtype)}
        value = loss(features, features, scale, impl=impl, **bias)
        assert value.dtype == torch.float32 and value.shape == ()
        numbers = {name: -1.0 for name in bias}
        torch.testing.assert_close(value, loss(features, features, 2.0, impl=impl, **numbers))
        (gradient,) = torch.autograd.grad(value, scale)
        assert gradient.dtype == dtype and gradient.shape == (1,)


def tensor_arguments():
    """op -> its arguments; each tensor among them is then replaced."""
    x, q = torch.ones(2, 4, 3), torch.ones(2, 2, 3, 8)
    table, four = torch.ones(3, 8), torch.ones(2, 4)
    pair = dict(image_features=four, text_features=four, logit_scale=torch.ones(1))
    return {
        "group_norm_silu": dict(x=x, num_groups=2, weight=four[0], bias=four[0], scale=four, shift=four),
        "cross_attention": dict(q=q, context_k=q, context_v=q, context_mask=torch.ones(2, 3) > 0, image_k=q,
                                image_v=q),
        "sample_noise": dict(seeds=SEEDS, step=torch.ones(1).long(), shape=(2, 3)),
        "add_noise": dict(x0=x, alpha=four[:, 0], sigma=four[:, 0], noise=x),
        "diffusion_step": dict(x=x, model_output=torch.cat([x, x]), table=table, step=torch.ones(1).long(),
                               seeds=SEEDS, guidance=four[:, 0], previous_x0=x),
        "contrastive_loss": pair | {"logit_bias": torch.ones(1)},
        "sigmoid_loss": pair | {"logit_bias": torch.ones(1)},
        "soft_contrastive_loss": pair,
    }  # fmt: skip


ARGUMENTS = [
    (op, name)
    for op, arguments in tensor_arguments().items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize("op, name", ARGUMENTS)
def test_a_tensor_without_strides_is_refused_by_its_name(op, name):
    # Catches: an error of torch that names no argument, or a sparse tensor that is accepted.
    arguments = tensor_arguments()[op]
    getattr(functional, op)(**arguments)
    value = arguments[name]
    odd = {"sparse": value.to_sparse(), "nested": torch.nested.nested_tensor([value])}
    if value.dim() == 2:
        odd["compressed rows"] = value.to_sparse_csr()
    for kind, wrong in odd.items():
        came = "a nested one" if kind == "nested" else f"the layout {wrong.layout}"
        message = rf"^{name}: expected a dense tensor \(layout torch.strided\), got {came}"
        with pytest.raises(TypeError, match=message):
            getattr(functional, op)(**arguments | {name: wrong})


@pytest.mark.parametrize(
    "message, call",
    [
        ("shape: expected a sequence", lambda: functional.sample_noise(SEEDS, 0, 3)),
        ("shape: expected .B, ...", lambda: functional.sample_noise(SEEDS, 0, ())),
        ("device: expected a torch.device or its name, got 'red'",
         lambda: functional.sample_noise(SEEDS, 0, (2, 3), "red")),
        ("guidance: expected a tensor of real numbers, got torch.complex64",
         lambda: functional.diffusion_step(
             torch.ones(2, 4), torch.ones(4, 4), torch.ones(3, 8), 0, guidance=torch.ones(2).cfloat())),
        ("learned_range: expected True or False, got str",
         lambda: functional.diffusion_step(
             torch.ones(2, 4), torch.ones(2, 8), torch.ones(3, 8), 0, learned_range="no")),
        ("q: expected float32, float16, bfloat16 or float64, got torch.float8",
         lambda: functional.cross_attention(*[torch.ones(1, 1, 2, 8).to(torch.float8_e5m2)] * 3)),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(message, call):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()
