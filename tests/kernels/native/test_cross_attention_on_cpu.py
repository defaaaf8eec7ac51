"""cross_attention of the native module against float64, on every instruction set of this processor."""

from __future__ import annotations

import math

import pytest
import torch

from dalle2_fast import functional
from dalle2_fast.ops import _native

if _native.WHY_ABSENT is not None:
    pytest.skip(_native.WHY_ABSENT, allow_module_level=True)


def make(b, h, t, s, t2, d, mask=True):
    """q, context_k, context_v, mask, image_k, image_v; slices of larger tensors, as networks pass them."""
    generator = torch.Generator().manual_seed(0)

    def heads(rows, parts):
        value = torch.randn(b, rows, parts * h * d, generator=generator)
        return value.unflatten(2, (parts, h, d)).permute(2, 0, 3, 1, 4).unbind(0)

    (q,), (context_k, context_v) = heads(t, 1), heads(s, 2)
    image_k, image_v = heads(t2, 2) if t2 else (None, None)
    context_mask = torch.rand(b, s, generator=generator) > 0.4 if mask else None
    return q, context_k, context_v, context_mask, image_k, image_v


def cast(values, dtype):
    return [value.to(dtype) if value is not None and value.is_floating_point() else value for value in values]


CASES = [
    # B, H, T, S, T2, D, mask
    (2, 3, 40, 37, 40, 48, True),  # a decoder's
    (1, 2, 7, 5, 0, 16, False),
    (2, 1, 33, 3, 61, 20, True),  # no whole vector
    (1, 1, 70, 200, 300, 64, True),  # several blocks of queries
    (1, 2, 3, 1, 1, 128, True),
    (1, 1, 5, 0, 9, 8, False),  # no context
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_close_to_truth(instructions, case, dtype):
    """Catches: a wrong panel or rest, a key of the padding, a mask that is read in the wrong order."""
    inputs = cast(make(*case), dtype)
    truth = functional.cross_attention(*cast(inputs, torch.float64), impl="reference")
    plain = functional.cross_attention(*inputs, impl="reference")
    actual = functional.cross_attention(*inputs, impl="fused")
    assert actual.dtype == dtype and actual.shape == truth.shape
    assert (actual - truth).norm() <= 1.5 * (plain - truth).norm() + 1e-6 * truth.norm()


@torch.no_grad()
def test_the_number_of_threads_and_the_batch_change_no_bit():
    """Catches: a head whose queries two threads share, cut otherwise."""
    inputs = make(3, 1, 100, 20, 50, 24)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(functional.cross_attention(*inputs, impl="fused"))
    torch.set_num_threads(before)
    results.append(torch.cat([functional.cross_attention(*(v[i : i + 1] for v in inputs)) for i in range(3)]))
    assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_what_is_masked_does_not_count(instructions):
    """Catches: 0 times NaN, and rows without a key that are not zero."""
    q, context_k, context_v, mask, *_ = make(2, 2, 9, 6, 0, 16)
    mask = mask.clone()
    mask[1] = False
    context_k, context_v = context_k.clone(), context_v.clone()
    clean = functional.cross_attention(q, context_k, context_v, mask, impl="reference")
    context_k.masked_fill_(~mask[:, None, :, None], math.nan)
    context_v.masked_fill_(~mask[:, None, :, None], math.inf)
    actual = functional.cross_attention(q, context_k, context_v, mask, impl="fused")
    torch.testing.assert_close(actual, clean, rtol=1e-5, atol=1e-6)
    assert bool((actual[1] == 0).all())


@torch.no_grad()
def test_large_scores_and_not_finite_ones(instructions):
    """Catches: an exponential that overflows, a NaN that a maximum drops, one that reaches another query."""
    q, k, v, *_ = make(1, 1, 20, 30, 0, 32, mask=False)
    truth = functional.cross_attention((200 * q).double(), k.double(), v.double(), impl="reference")
    actual = functional.cross_attention(200 * q, k, v, impl="fused")
    torch.testing.assert_close(actual, truth.float(), rtol=1e-3, atol=1e-3)
    q = q.clone()
    q[0, 0, 3, 5] = math.nan
    actual = functional.cross_attention(q, k, v, impl="fused")
    assert bool(actual[0, 0, 3].isnan().all()) and bool(actual[0, 0, 4:].isfinite().all())


def test_gradients_are_the_reference_s():
    """Catches: a gradient that is silently missing."""
    q, k, v, *_ = make(1, 1, 4, 5, 0, 16, mask=False)
    q = q.clone().requires_grad_()
    functional.cross_attention(q, k, v).sum().backward()
    assert bool(q.grad.abs().sum() > 0)
    with pytest.raises(RuntimeError, match="no fused gradient on the CPU"):
        functional.cross_attention(q, k, v, impl="fused")
    with torch.no_grad():
        expected = functional.cross_attention(q, k, v, impl="fused")
    assert torch.equal(functional.cross_attention(q.detach(), k, v), expected)
    half = [value.detach().bfloat16() for value in (q, k, v)]
    plain = functional.cross_attention(*half, impl="reference")
    assert torch.equal(functional.cross_attention(*half), plain)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert functional.cross_attention(q, k, v, impl="fused").dtype == torch.bfloat16


@torch.no_grad()
def test_opcheck_one_graph_and_empty_tensors():
    """Catches: fakes that lie about strides, a graph break, a crash without queries."""
    inputs = make(2, 2, 6, 3, 4, 16)
    op = functional.cross_attention(*inputs, impl="fused")
    torch.library.opcheck(torch.ops.dalle2_fast.cross_attention_inference.default, (*inputs, 0.25))
    compiled = torch.compile(functional.cross_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), op)
    assert functional.cross_attention(*make(0, 2, 6, 3, 4, 16), impl="fused").shape == (0, 2, 6, 16)
    assert functional.cross_attention(*make(1, 2, 0, 3, 4, 16), impl="fused").shape == (1, 2, 0, 16)
