"""Rows of `cross_attention`: the acceptance table at shapes of real models."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.registry import Case, add, compiled, rounded_randn
from dalle2_fast import functional


def attention_inputs(b, h, t, s, d, image, masked, gradient, device, dtype, tiny):
    b, h, t, s = (2, 2, 20, 9) if tiny else (b, h, t, s)
    randn = rounded_randn(device, dtype)

    def projection(count: int, parts: int) -> tuple[Tensor, ...]:  # views of one tensor, as in the U-Net
        return randn(b, count, parts, h, d).permute(2, 0, 3, 1, 4).unbind(0)

    q, *image_kv = projection(t, 3 if image else 1)
    context_k, context_v = projection(s, 2)
    mask = None
    if masked:
        lengths = torch.arange(b, device=device) % s + 1
        mask = torch.arange(s, device=device) < lengths[:, None]
    grad = randn(b, t, h, d).transpose(1, 2) if gradient else None
    return dict(q=q, context_k=context_k, context_v=context_v, context_mask=mask,
                image_k=image_kv[0] if image else None, image_v=image_kv[1] if image else None,
                grad=grad)  # fmt: skip


def attention_ours(impl, q, context_k, context_v, context_mask=None, image_k=None, image_v=None):
    return functional.cross_attention(q, context_k, context_v, context_mask, image_k, image_v, impl=impl)


def attention_sdpa(q, context_k, context_v, context_mask=None, image_k=None, image_v=None):
    """Concatenation and one scaled_dot_product_attention: the usual code without a fused op."""
    k, v, mask = context_k, context_v, context_mask
    if image_k is not None:
        k, v = torch.cat([k, image_k], dim=2), torch.cat([v, image_v], dim=2)
        if mask is not None:
            mask = F.pad(mask, (0, image_k.shape[2]), value=True)
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None, :])


def with_backend(backend: SDPBackend) -> Callable:
    def run(**inputs):
        with sdpa_kernel(backend):
            return attention_sdpa(**inputs)

    return run


def add_attention(
    name, b, h, t, s, d=64, *, image=False, masked=False, backward=False, target_us=None, factors
):
    size = 2 * b * h * d
    keys = s + (t if image else 0)
    forward = size * (2 * t + 2 * keys)
    flops = 4 * b * h * t * keys * d
    if backward:  # out is not read again; P is recomputed: five products instead of the two of forward
        forward, flops = forward + size * (3 * t + 4 * keys), flops * 7 // 2
    rivals = {kind: with_backend(getattr(SDPBackend, backend)) for kind, backend in (
        ("sdpa cudnn", "CUDNN_ATTENTION"), ("sdpa flash", "FLASH_ATTENTION"),
        ("sdpa efficient", "EFFICIENT_ATTENTION"), ("eager", "MATH"),
    )}  # fmt: skip
    leaves = ("q", "context_k", "context_v", *(("image_k", "image_v") if image else ()))
    add(
        Case(
            name,
            functools.partial(attention_inputs, b, h, t, s, d, image, masked, backward),
            attention_ours,
            {**rivals, "compile": compiled(attention_sdpa)},
            bytes=forward,
            flops=flops,
            target_us=target_us,
            target_factors=factors,
            backward=leaves if backward else (),
            with_forward=backward,
        )
    )


SDPA = ("sdpa cudnn", "sdpa flash", "sdpa efficient")
CROSS = dict(b=16, h=10, t=4096, s=77)
add_attention("cross-attention forward", **CROSS, target_us=52,
              factors={"eager": 8.0, **dict.fromkeys(SDPA, 1.1)})  # fmt: skip
add_attention("cross-attention forward masked", **CROSS, masked=True, factors=dict.fromkeys(SDPA, 1.5))
add_attention("cross-attention forward and backward", **CROSS, backward=True, target_us=180,
              factors=dict.fromkeys(SDPA, 2.0))  # fmt: skip
add_attention("unclip attention, batch 2", 2, 10, 1024, 81, image=True, masked=True, target_us=18,
              factors=dict.fromkeys(SDPA, 1.5))  # fmt: skip
add_attention("unclip attention, batch 64", 64, 10, 1024, 81, image=True, masked=True, target_us=464,
              factors=dict.fromkeys(SDPA, 1.1))  # fmt: skip  # 464 us are 400 TFLOP/s
