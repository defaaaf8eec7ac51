"""out = softmax(softmax_scale q [context_k; image_k]^T) [context_v; image_v]"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.ops import _checks, _dispatch

_MAX_HEAD_WIDTH = 128  # of the kernel


def cross_attention(
    q: Tensor,  # [B, H, T, D]
    context_k: Tensor,  # [B, H, S, D]
    context_v: Tensor,  # [B, H, S, D]
    context_mask: Tensor | None = None,  # bool [B, S]
    image_k: Tensor | None = None,  # [B, H, T2, D]
    image_v: Tensor | None = None,  # [B, H, T2, D]
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:  # [B, H, T, D]
    """Attention of q on context keys and, in the same softmax, optionally on the image's own keys.

    out = softmax(softmax_scale * q [context_k; image_k]^T) [context_v; image_v]. Without image keys this is
    plain (cross-)attention; `cross_attention(q, k, v)` is bidirectional self-attention.

    Args:
        q, context_k, context_v, image_k, image_v: one floating dtype (any mix under autocast, which casts all
            to its dtype), any strides.
        context_mask: True = attend. Image keys are always attended to.
        softmax_scale: D ** -0.5 when None.
        impl: "auto", "reference" or "fused".

    Returns:
        The dtype of q; under autocast the autocast dtype. A query that may attend to no key at all gives
        zeros, and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or only one of image_k and
            image_v is given, or impl="fused" and D > 128.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Vaswani et al., 1706.03762; the joint softmax over text and image keys: GLIDE, 2112.10741.
    """
    _check_arguments(q, context_k, context_v, context_mask, image_k, image_v, softmax_scale)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    tensors = (q, context_k, context_v, image_k, image_v)
    if _dispatch.use_reference(impl, *tensors) or _is_too_wide(q, impl):
        return cross_attention_reference(
            q, context_k, context_v, context_mask, image_k, image_v, softmax_scale
        )
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, context_k, context_v, image_k, image_v = (x if x is None else x.to(dtype) for x in tensors)
    return torch.ops.dalle2_fast.cross_attention(
        q, context_k, context_v, context_mask, image_k, image_v, softmax_scale
    )[0]


def _is_too_wide(q: Tensor, impl: str) -> bool:
    """Whether the head width is beyond the kernel's; with impl="fused" that is a ValueError."""
    width = q.shape[3]
    if width > _MAX_HEAD_WIDTH and impl == "fused":
        raise ValueError(f'q: expected a head width D <= {_MAX_HEAD_WIDTH} with impl="fused", got {width}')
    return width > _MAX_HEAD_WIDTH


def _check_arguments(
    q: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    context_mask: Tensor | None,
    image_k: Tensor | None,
    image_v: Tensor | None,
    softmax_scale: float | None,
) -> None:
    _checks.floating("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, H, T, D], got {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    if width == 0:
        raise ValueError(f"q: expected a head width D >= 1, got {tuple(q.shape)}")
    if (image_k is None) != (image_v is None):
        given, missing = ("image_k", "image_v") if image_v is None else ("image_v", "image_k")
        raise ValueError(f"{missing}: expected a tensor because {given} is given, got None")
    device = q.device.type  # meta knows no autocast
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    pairs = [("context", "S", context_k, context_v)]
    if image_k is not None:
        pairs.append(("image", "T2", image_k, image_v))
    for kind, letter, k, v in pairs:
        for name, value in ((f"{kind}_k", k), (f"{kind}_v", v)):
            _checks.floating(name, value)
            if value.dim() != 4:
                raise ValueError(f"{name}: expected [B, H, {letter}, D], got {tuple(value.shape)}")
            length = k.shape[2]
            _checks.shape(name, value, f"B, H, {letter}, D", (batch, heads, length, width))
            _checks.same_device(name, value, "q", q)
            # Under autocast the dtypes meet in attention itself.
            if value.dtype != q.dtype and not autocast:
                raise TypeError(f"{name}: expected {q.dtype} (that of q), got {value.dtype}")
    if context_mask is not None:
        _checks.tensor("context_mask", context_mask)
        if context_mask.dtype != torch.bool:
            raise TypeError(f"context_mask: expected torch.bool (True = attend), got {context_mask.dtype}")
        _checks.shape("context_mask", context_mask, "B, S", (batch, context_k.shape[2]))
        _checks.same_device("context_mask", context_mask, "q", q)
    if softmax_scale is not None:
        _checks.finite_number("softmax_scale", softmax_scale)


def cross_attention_reference(
    q: Tensor,  # [B, H, T, D]
    context_k: Tensor,  # [B, H, S, D]
    context_v: Tensor,  # [B, H, S, D]
    context_mask: Tensor | None,  # bool [B, S], True = attend
    image_k: Tensor | None,  # [B, H, T2, D]
    image_v: Tensor | None,  # [B, H, T2, D]
    softmax_scale: float,
) -> Tensor:  # [B, H, T, D]
    """softmax(softmax_scale q [context_k; image_k]^T) [context_v; image_v]; zero without keys"""
    mask = context_mask
    empty = None
    if image_k is not None:
        k = torch.cat((context_k, image_k), dim=2)
        v = torch.cat((context_v, image_v), dim=2)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(mask.shape[0], image_k.shape[2])), dim=1)
    else:
        k, v = context_k, context_v
    if k.shape[2] == 0:
        return q * 0 if q.requires_grad else torch.zeros_like(q)
    if mask is not None:
        if image_k is None or image_k.shape[2] == 0:
            # A softmax over nothing is 0 / 0 forward and backward. Let such rows attend to everything and
            # discard what they found: zeros, and zero gradients, whatever the backend under SDPA does.
            empty = ~mask.any(dim=1)[:, None]
            mask = mask | empty
        mask = mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)
    return out if empty is None else out.masked_fill(empty[:, None, None], 0)
