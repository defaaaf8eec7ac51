"""The attention kernels against float64, for values and all gradients.

Interpreted on the CPU with small shapes; compiled, and with the models' shapes (marked gpu), where a GPU is.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dalle2_fast import functional
from tests.ops.test_cross_attention import formula, make
from tests.support.truth import assert_close_to_truth, outputs_and_gradients

pytest.importorskip("triton")

DTYPES = [(torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.bfloat16, True)]
# B, H, T, S, T2 (0: no image keys), D: each head width, both forms, partial tiles. A mask takes all keys from
# the last of the batch.
SHAPES = [
    (2, 1, 40, 13, 0, 32),
    (2, 1, 130, 77, 0, 64),
    (2, 1, 17, 81, 0, 80),
    (2, 1, 5, 6, 0, 104),
    (2, 1, 9, 128, 0, 128),
    (1, 2, 33, 40, 33, 96),
    (1, 1, 65, 81, 70, 32),
    (2, 1, 7, 300, 0, 64),
    (1, 1, 3, 512, 0, 16),
]


@pytest.fixture(autouse=True)
def short_form_in_float32(kernel_device):
    """Low precision hides small errors of a formula. The short form has no float32 for want of registers, of
    which the interpreter has enough; image keys and long contexts still take the long form."""
    from dalle2_fast.kernels.cross_attention import _common

    def is_resident(keys, image_keys, width, itemsize):
        return not image_keys and keys <= 128

    with pytest.MonkeyPatch.context() as patch:
        if kernel_device == "cpu":
            patch.setattr(_common, "is_resident", is_resident)
        yield


def fused(**inputs):
    return functional.cross_attention(impl="fused", **inputs)


def compare(inputs, dtype, device, function=fused, plain=formula):
    inputs = {name: x if x is None else x.to(device) for name, x in inputs.items()}
    truth = outputs_and_gradients(plain, inputs, torch.float64)
    yardstick = outputs_and_gradients(plain, inputs, dtype)
    actual = outputs_and_gradients(function, inputs, dtype)
    # On a GPU three tf32 products stand for one in float32, and tensor cores cut off what they add up: d q of
    # 1500 keys of D = 128 is off by 3.3e-6, plain torch by 0.8e-6 (H200).
    slack = 4e-6 if dtype == torch.float32 and device == "cuda" else 1e-6
    assert_close_to_truth(actual, yardstick, truth, slack=slack)
    assert all(value.dtype == dtype for value in actual.values())
    return actual


@pytest.mark.parametrize("dtype, masked", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_close_to_truth(shape, masked, dtype, kernel_device):
    # Catches: a wrong formula, a partial tile that counts, a mask laid on the image keys, columns past D.
    compare(make(*shape, masked=masked), dtype, kernel_device)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("image_keys", [0, 20])
def test_any_split_of_the_queries(parts, image_keys, kernel_device, monkeypatch):
    # Catches: a tile of queries lost or counted twice, sums of programs that overwrite each other.
    from dalle2_fast.kernels.cross_attention import _common

    monkeypatch.setattr(_common, "split", lambda *args, **kwargs: parts)
    compare(make(1, 1, 200, 20, image_keys, 16), torch.float32, kernel_device)


def test_views_of_a_fused_projection(kernel_device):
    # Catches: a stride assumed, in the values or for the gradients.
    torch.manual_seed(0)

    def split(packed, context, attend):  # [B, T, 3, H, D] and [B, S, H, 2, D]
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        context_k, context_v = context.permute(3, 0, 2, 1, 4)
        return attend(q=q, context_k=context_k, context_v=context_v, image_k=k, image_v=v)

    inputs = {"packed": torch.randn(2, 19, 3, 2, 32), "context": torch.randn(2, 7, 2, 2, 32)}
    compare(
        inputs,
        torch.float16,
        kernel_device,
        lambda packed, context: split(packed, context, fused),
        lambda packed, context: split(packed, context, formula),
    )


@pytest.mark.parametrize("image_keys", [0, 6])
def test_columns_that_are_not_adjacent_and_gradients_without_strides(image_keys, kernel_device):
    torch.manual_seed(0)
    inputs = make(1, 2, 10, 5, image_keys, 32)
    inputs = {name: x.transpose(2, 3).contiguous() for name, x in inputs.items()}

    def attend(function, **inputs):
        out = function(**{name: x.transpose(2, 3) for name, x in inputs.items()})
        return out.sum().expand(3)  # the gradient of a sum is an expanded scalar

    compare(
        inputs,
        torch.float32,
        kernel_device,
        lambda **kw: attend(fused, **kw),
        lambda **kw: attend(formula, **kw),
    )


@pytest.mark.parametrize("image_keys", [0, 8])
@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_any_scale(scale, image_keys, kernel_device):
    # Catches: a maximum taken before a negative scale; -inf * 0.
    compare(
        make(2, 1, 9, 7, image_keys, 32, masked=True),
        torch.float32,
        kernel_device,
        lambda **kw: fused(softmax_scale=scale, **kw),
        lambda **kw: formula(softmax_scale=scale, **kw),
    )


@pytest.mark.parametrize("keys", [7, 130])
def test_rows_without_keys_give_zeros_and_zero_gradients(keys, kernel_device):
    inputs = {name: x.to(kernel_device) for name, x in make(2, 2, 5, keys, 0, 32, masked=True).items()}
    results = outputs_and_gradients(fused, inputs, torch.float32)
    for name in ("output", "d q", "d context_k", "d context_v"):
        assert torch.count_nonzero(results[name][1]) == 0, name
        assert torch.count_nonzero(results[name][0]) > 0, name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("keys, image_keys", [(7, 0), (7, 3), (130, 0)])
def test_masked_keys_do_not_count(keys, image_keys, value, kernel_device):
    # Catches: a probability of 0 times NaN, forward or backward; also in a row that may attend to no key.
    inputs = {name: x.to(kernel_device) for name, x in make(2, 1, 5, keys, image_keys, 32).items()}
    mask = torch.arange(keys, device=kernel_device) < torch.tensor([[4], [0]], device=kernel_device)
    for name in ("context_k", "context_v"):
        broken = inputs | {name: inputs[name].masked_fill(~mask[:, None, :, None], value)}
        for dtype in (torch.float32, torch.float16):
            found, expected = (
                outputs_and_gradients(lambda **kw: fused(context_mask=mask, **kw), tensors, dtype)
                for tensors in (broken, inputs)
            )
            for key in expected:
                assert torch.equal(found[key], expected[key]), (name, key)


@pytest.mark.parametrize("keys", [5, 131])
def test_scores_far_from_zero(keys, kernel_device):
    # Catches: keys past the end, whose score is 0, taken for the largest; exp of large numbers.
    for sign in (-1, 1):
        q = torch.full((1, 1, 3, 32), 30.0, device=kernel_device, requires_grad=True)
        k = torch.full((1, 1, keys, 32), 30.0 * sign, device=kernel_device)
        v = torch.randn(1, 1, keys, 32, device=kernel_device)
        out = fused(q=q, context_k=k, context_v=v)
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=1e-4, atol=1e-5)
        out.sum().backward()
        assert bool(q.grad.isfinite().all())


@pytest.mark.parametrize("width", [32, 104])
def test_one_key(width, kernel_device):
    inputs = {name: x.to(kernel_device).requires_grad_() for name, x in make(1, 2, 5, 1, 0, width).items()}
    out = fused(**inputs)
    torch.testing.assert_close(out, inputs["context_v"].expand_as(out))
    grad = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, list(inputs.values()), grad)
    torch.testing.assert_close(dv, grad.sum(2, keepdim=True))
    for zero in (dq, dk):
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=2e-5)


def test_nothing_to_attend_to(kernel_device):
    q = torch.randn(2, 2, 3, 32, device=kernel_device, requires_grad=True)
    none = torch.zeros(2, 2, 0, 32, device=kernel_device, requires_grad=True)
    out = fused(q=q, context_k=none, context_v=none)
    out.sum().backward()
    assert torch.count_nonzero(out) == 0 and torch.count_nonzero(q.grad) == 0
    assert none.grad.shape == none.shape
    alone = fused(q=q, context_k=none, context_v=none, image_k=q, image_v=q)
    torch.testing.assert_close(alone, fused(q=q, context_k=q, context_v=q))
    torch.testing.assert_close(fused(q=q, context_k=q, context_v=q, image_k=none, image_v=none), alone)
    assert fused(q=q[:0], context_k=q[:0], context_v=q[:0]).shape == (0, 2, 3, 32)
    empty = q[:, :, :0].detach().requires_grad_()
    out = fused(q=empty, context_k=q, context_v=q)
    assert out.shape == (2, 2, 0, 32)
    q.grad = None
    out.sum().backward()
    assert torch.count_nonzero(q.grad) == 0


def test_gradients_are_the_same_bits_every_time(kernel_device):
    # NaN in fresh memory shows an element that no program wrote.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for shape in ((2, 1, 70, 20, 0, 32), (1, 1, 70, 20, 30, 32)):
            inputs = {name: x.to(kernel_device) for name, x in make(*shape, masked=True).items()}
            first, second = (outputs_and_gradients(fused, inputs, torch.float32) for _ in range(2))
            for name in first:
                assert bool(first[name].isfinite().all()), name
                assert torch.equal(first[name], second[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_merging_the_heads_is_a_view(kernel_device):
    for image_keys in (0, 3):
        inputs = make(2, 3, 5, 4, image_keys, 32)
        inputs = {name: x.to(kernel_device).requires_grad_() for name, x in inputs.items()}
        out = fused(**inputs)
        for value in (out, *torch.autograd.grad(out.sum(), list(inputs.values()))):
            assert value.transpose(1, 2).is_contiguous()


def test_autocast_runs_in_its_dtype(kernel_device):
    q = torch.randn(1, 2, 4, 32, device=kernel_device, requires_grad=True)
    k = torch.randn(1, 2, 3, 32, device=kernel_device, dtype=torch.float16)
    with torch.autocast(kernel_device, torch.float16):
        out = fused(q=q, context_k=k, context_v=k)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, fused(q=q.half(), context_k=k, context_v=k), rtol=0, atol=0)
    out.sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("image_keys", [None, 3])
def test_registration(image_keys, kernel_device):
    # Catches: a fake of another shape, dtype or stride; an output that aliases an input; no gradient.
    fused(**{name: x.to(kernel_device) for name, x in make(1, 1, 1, 1, 0, 16).items()})  # loads the op
    inputs = make(2, 1, 5, 4, image_keys or 0, 32, masked=True)
    inputs = {name: x.to(kernel_device).requires_grad_(x.dtype != torch.bool) for name, x in inputs.items()}
    names = ("q", "context_k", "context_v", "context_mask", "image_k", "image_v")
    args = [inputs.get(name) for name in names]
    op = torch.ops.dalle2_fast.cross_attention.default
    torch.library.opcheck(op, (*args, 0.3))
    args = [x if x is None else x.detach() for x in args]
    out, lse = op(*args, 0.3)
    args = (torch.ones_like(out), *args, out if lse.numel() else None, lse, 0.3)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dalle2_fast.cross_attention_backward.default, args, test_utils=tests)


def test_compiles_whole_and_takes_another_batch(kernel_device):
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for batch in (1, 2):
        inputs = make(batch, 1, 5, 4, 5, 32, masked=True)
        inputs = {name: x.to(kernel_device) for name, x in inputs.items()}
        expected, actual = (outputs_and_gradients(f, inputs, torch.float32) for f in (fused, compiled))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


def test_there_is_no_second_derivative(kernel_device):
    # Catches: a gradient of a gradient that is silently zero.
    q = torch.randn(1, 1, 2, 16, device=kernel_device, requires_grad=True)
    (gradient,) = torch.autograd.grad(fused(q=q, context_k=q, context_v=q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_head_width_too_large_for_the_kernel(kernel_device):
    q = torch.zeros(1, 1, 2, 160, device=kernel_device)
    with pytest.raises(ValueError, match=r'q: expected a head width D <= 128 with impl="fused", got 160'):
        fused(q=q, context_k=q, context_v=q)
    assert functional.cross_attention(q, q, q).shape == q.shape


# On a GPU every example compiles new kernels, and many other tests make the same claim there.
@settings(max_examples=3 if torch.cuda.is_available() else 8, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 40), st.integers(2, 90)),
    image_keys=st.sampled_from([0, 0, 2, 21]),  # with one key alone, dq is 0: see test_one_key
    width=st.sampled_from([8, 16, 20]),
    layout=st.permutations([0, 1, 2, 3]),
    masked=st.booleans(),
)
def test_any_shape_and_layout(kernel_device, sizes, image_keys, width, layout, masked):
    inputs = make(*sizes, image_keys, width, masked=masked)
    if masked:
        inputs["context_mask"][:-1, :2] = True
    back = [layout.index(axis) for axis in range(4)]
    for name, x in inputs.items():
        if x.dim() == 4:
            inputs[name] = x.permute(layout).contiguous().permute(back)
    compare(inputs, torch.float32, kernel_device)


def test_split_shares_the_tiles():
    from dalle2_fast.kernels.cross_attention._common import split

    for capability in ((8, 0), (9, 0), (7, 7)):
        for pairs in (1, 20, 160, 640):
            for tiles in (1, 3, 64, 1000):
                assert 1 <= split(pairs, tiles, capability, 2, 1.0) <= min(tiles, 64)
    assert split(20, 64, (9, 0), 1, 1.0) > 4  # 20 programs would leave most of 132 multiprocessors empty
    assert split(6400, 64, (9, 0), 1, 1.0) == 1  # and 6400 need no help


# ------------------------------------------------------------------------------------- the models' shapes

MODELS = {
    "Karlo 32x32": (2, 10, 1024, 81, 1024, 64),
    "Karlo 8x8": (2, 20, 64, 81, 64, 64),
    "GLIDE 16x16": (2, 12, 256, 128, 256, 64),
    "Kandinsky 2.2 16x16": (2, 18, 256, 10, 256, 64),
    "DALLE2-pytorch": (2, 8, 256, 78, 0, 32),
    "cross-attention": (2, 10, 4096, 77, 0, 64),
    "cross-attention D80": (2, 8, 1024, 77, 0, 80),
    "long context": (1, 8, 1024, 512, 0, 64),
    "self-attention D128": (1, 4, 1500, 1500, 0, 128),
    "odd": (3, 5, 1001, 257, 333, 104),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_shapes_of_the_models(shape, masked, dtype):
    compare(make(*shape, masked=masked), dtype, "cuda")


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    # Catches: a wait for the device, an allocation or a launch outside the stream.
    inputs = {name: x.cuda().half() if x.is_floating_point() else x.cuda()
              for name, x in make(2, 4, 256, 81, 256, 64, masked=True).items()}  # fmt: skip
    expected = fused(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(**inputs)
    graph.replay()
    assert torch.equal(out, expected)
