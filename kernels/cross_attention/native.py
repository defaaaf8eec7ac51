"""cross_attention on the CPU without a gradient, in dalle2_fast._C (csrc/cpu/attention.cpp).

Keys of the context and of the image are packed for the product of matrices, without the masked ones: nothing
is concatenated. The scores of 32 queries stay in the L2 cache.

This op has no gradient, and saves nothing for one. Where gradients are needed torch's attention runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast import _C

from .._op import define, implement_on_cpu

_DTYPES = {getattr(torch, name): code for name, code in _C.DTYPES.items()}


def _empty_output(q: Tensor, *_) -> Tensor:
    """Uninitialised [B, H, T, D] with the heads of a query side by side."""
    b, h, t, d = q.shape
    return torch.empty((b, t, h, d), dtype=q.dtype, device=q.device).transpose(1, 2)


cross_attention_inference = define(
    "cross_attention_inference(Tensor q, Tensor context_k, Tensor context_v, Tensor? context_mask, "
    "Tensor? image_k, Tensor? image_v, float softmax_scale) -> Tensor",
    fake=_empty_output,
)


def _rows(value: Tensor) -> Tensor:
    """The tensor itself where its last dimension has no gaps, otherwise a copy."""
    return value if value.stride(3) == 1 or value.shape[3] == 1 else value.contiguous()


def _heads(value: Tensor) -> tuple[int, int, int, int]:
    return value.data_ptr(), value.stride(0), value.stride(1), value.stride(2)


_NO_KEYS = ((0, 0, 0, 0), (0, 0, 0, 0), 0, 0, 0)


def _attend(
    q: Tensor,  # [B, H, T, D]
    context_k: Tensor,  # [B, H, S, D]
    context_v: Tensor,  # [B, H, S, D]
    context_mask: Tensor | None,  # bool [B, S]
    image_k: Tensor | None,  # [B, H, T2, D]
    image_v: Tensor | None,  # [B, H, T2, D]
    softmax_scale: float,
) -> Tensor:  # [B, H, T, D]
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"q: expected float32, bfloat16 or float16, got {q.dtype}")
    out = _empty_output(q)
    if out.numel() == 0:
        return out
    q, context_k, context_v = _rows(q), _rows(context_k), _rows(context_v)
    mask = None if context_mask is None else context_mask.contiguous()
    count = context_k.shape[2]
    context = (_heads(context_k), _heads(context_v), count, 0 if mask is None else mask.data_ptr(), count)
    image = _NO_KEYS
    if image_k is not None and image_v is not None:
        image_k, image_v = _rows(image_k), _rows(image_v)
        image = (_heads(image_k), _heads(image_v), image_k.shape[2], 0, 0)
    b, h, t, d = q.shape
    _C.cpu.attention(
        b, h, t, d, _DTYPES[q.dtype], softmax_scale, _heads(q), context, image, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


implement_on_cpu(cross_attention_inference, _attend)
