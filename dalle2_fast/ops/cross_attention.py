"""out = softmax(softmax_scale q [context_k; image_k]^T) [context_v; image_v]"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dalle2_fast.ops import _checks, _dispatch
from dalle2_fast.ops._dtypes import is_transformed

_MAX_HEAD_WIDTH = 128  # the largest D that the kernel supports


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
    """Attention of q to context keys and, in the same softmax, optionally to the keys of the image itself.

    out = softmax(softmax_scale * q [context_k; image_k]^T) [context_v; image_v]. Without image keys this is
    plain (cross-)attention; `cross_attention(q, k, v)` is bidirectional self-attention.

    All tensors but the mask have one floating dtype and any strides. Under autocast their dtypes may differ,
    because autocast casts them all to its dtype.

    Args:
        q: queries [B, H, T, D].
        context_k: keys of the context [B, H, S, D].
        context_v: values of the context [B, H, S, D].
        context_mask: bool [B, S], True = attend. Image keys are always attended to. A key or value that is
            masked has no effect, also if it is NaN.
        image_k: keys of the image [B, H, T2, D], together with image_v.
        image_v: values of the image [B, H, T2, D].
        softmax_scale: factor of the scores; None means D ** -0.5.
        impl: "auto", "reference" or "fused".

    Returns:
        [B, H, T, D] in the dtype of q; under autocast in the autocast dtype. A query that may attend to no
        key at all gives zeros, and zero gradients.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device, only one of image_k and image_v is
            given, or impl="fused" and D > 128.
        RuntimeError: impl="fused" and no kernel can run here, or, on the CPU, an input requires a gradient or
            has a tangent, for which only the reference has a rule there (impl="auto" then takes it).
        NotImplementedError: the tangent of the kernel is differentiated, or its gradient under forward mode.

    Source: Vaswani et al., 1706.03762; the joint softmax over text and image keys: GLIDE, 2112.10741.

    Example:
        >>> from dalle2_fast import functional
        >>> q = torch.randn(2, 4, 16, 8)
        >>> k, v = torch.randn(2, 2, 4, 7, 8)
        >>> mask = torch.ones(2, 7, dtype=torch.bool)
        >>> functional.cross_attention(q, k, v, mask, image_k=q, image_v=q).shape
        torch.Size([2, 4, 16, 8])
    """
    _check_arguments(q, context_k, context_v, context_mask, image_k, image_v, softmax_scale)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    tensors = (q, context_k, context_v, image_k, image_v)
    # On the CPU torch multiplies half precision in AMX tiles, and takes as long as the kernel.
    native = impl == "fused" or q.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    has_tangent = not _dispatch.is_native(q)
    unsuitable = _dispatch.use_reference(impl, *tensors, on_cpu=native, forward_mode=has_tangent)
    if unsuitable or _is_too_wide(q, impl) or _lacks_gradient(impl, tensors):
        return cross_attention_reference(
            q, context_k, context_v, context_mask, image_k, image_v, softmax_scale
        )
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, context_k, context_v, image_k, image_v = (x if x is None else x.to(dtype) for x in tensors)
        _dispatch.use_reference(impl, q)  # raises where no kernel takes the autocast dtype
    arguments = (q, context_k, context_v, context_mask, image_k, image_v, softmax_scale)
    if _dispatch.is_native(q):
        return torch.ops.dalle2_fast.cross_attention_inference.default(*arguments)
    return _dispatch.kernel("cross_attention")(*arguments)[0]


def _lacks_gradient(impl: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the kernel has no gradient and one is needed. With impl="fused" that is a RuntimeError."""
    if not (_dispatch.is_native(tensors[0]) and _dispatch.needs_gradient(*tensors)):
        return False
    if impl == "fused":
        raise RuntimeError(
            'impl="fused": cross_attention has no fused gradient on the CPU; use impl="auto" or '
            "torch.no_grad()"
        )
    return True


def _is_too_wide(q: Tensor, impl: str) -> bool:
    """Whether the kernel does not support the head width. With impl="fused" that is a ValueError."""
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
    if q.dtype not in (*_dispatch.DTYPES, torch.float64):  # torch multiplies no other floats
        raise TypeError(f"q: expected float32, float16, bfloat16 or float64, got {q.dtype}")
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, H, T, D], got {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    if width == 0:
        raise ValueError(f"q: expected a head width D >= 1, got {tuple(q.shape)}")
    if (image_k is None) != (image_v is None):
        given, missing = ("image_k", "image_v") if image_v is None else ("image_v", "image_k")
        raise ValueError(f"{missing}: expected a tensor because {given} is given, got None")
    device = q.device.type  # torch has no autocast for the meta device
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
            # Under autocast the dtypes may differ here, because attention casts them to one dtype.
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
    if mask is not None:
        # The softmax gives a masked key the weight 0, but 0 * NaN is NaN, forward and backward.
        masked = ~mask[:, None, :, None]
        context_k, context_v = context_k.masked_fill(masked, 0), context_v.masked_fill(masked, 0)
    if image_k is not None:
        k = torch.cat((context_k, image_k), dim=2)
        v = torch.cat((context_v, image_v), dim=2)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(mask.shape[0], image_k.shape[2])), dim=1)
    else:
        k, v = context_k, context_v
    if k.shape[2] == 0:
        everything = q + (k + v).sum(2, keepdim=True)  # so that each of them has a gradient, which is 0
        if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
            everything = everything.to(torch.get_autocast_dtype(q.device.type))
        return everything.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0)
    if mask is not None:
        if image_k is None or image_k.shape[2] == 0:
            # A softmax over no keys is 0 / 0 forward and backward. Let such rows attend to all keys and
            # replace their results by 0: then their gradients are 0, too, on every backend of torch.
            empty = ~mask.any(dim=1)[:, None]
            mask = mask | empty
        mask = mask[:, None, None, :]
    # torch's fast attention has no forward-mode rule.
    backend = sdpa_kernel(SDPBackend.MATH) if is_transformed() else nullcontext()
    with backend:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)
    return out if empty is None else out.masked_fill(empty[:, None, None], 0)
