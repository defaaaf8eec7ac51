"""loss = mean_i (log sum_j exp L[i, j] + log sum_j exp L[j, i]) / 2 - L[i, i],  L = scale I T^T + bias"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.ops import _checks, _dispatch
from dalle2_fast.ops._dtypes import compute_dtype


def contrastive_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:  # scalar
    """Symmetric InfoNCE: mean cross-entropy of finding each image's text and each text's image.

    The fused form computes the N^2 logits one tile at a time. In addition to the gradients it takes a
    workspace of 16 MB on the CPU and 256 MB on a GPU, regardless of N. It has no second derivative.

    Args:
        image_features: floating [N, D], usually of unit norm.
        text_features: floating [N, D]; row i belongs to row i of image_features.
        logit_scale: factor of the inner products: a number or a scalar tensor. It is the inverse of the
            temperature, already exponentiated.
        logit_bias: number or scalar tensor that is added to every logit. It cancels, and is accepted because
            open_clip passes it.
        impl: "auto", "reference" or "fused".

    Returns:
        A float32 scalar (float64 for float64 features). The maths is float32 also under autocast.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device, or N or D is 0.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Radford et al., 2103.00020, figure 3.

    Example:
        >>> from dalle2_fast import functional
        >>> features = torch.eye(4)
        >>> round(functional.contrastive_loss(features, features, logit_scale=1.0).item(), 4)
        0.7437
    """
    _checks.contrastive(image_features, text_features, logit_scale, logit_bias)
    if not _dispatch.use_native(impl, image_features, text_features):
        return contrastive_loss_reference(image_features, text_features, logit_scale, logit_bias)
    scale = scalar_like(logit_scale, image_features)
    loss = torch.ops.dalle2_fast.contrastive_loss(image_features, text_features, scale)[0]
    if isinstance(logit_bias, Tensor):  # the bias cancels, but its gradient must be 0 and not None
        loss = loss + 0 * logit_bias.to(loss).reshape(())
    return loss


def scalar_like(value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar tensor on the device of `like`, in the dtype in which sums over `like` are computed."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        return value.to(like.device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=like.device)


def contrastive_loss_reference(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
) -> Tensor:  # scalar
    """mean over i of (-log softmax_j(L[i, j])[i] - log softmax_j(L[j, i])[i]) / 2,  L = scale I T^T + bias"""
    dtype = compute_dtype(image_features.dtype)
    with without_autocast(image_features.device):
        logits = scaled_logits(image_features.to(dtype), text_features.to(dtype), logit_scale, logit_bias)
        matched = torch.arange(logits.shape[0], device=logits.device)
        return 0.5 * (F.cross_entropy(logits, matched) + F.cross_entropy(logits.T, matched))


def scaled_logits(
    rows: Tensor, columns: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None
) -> Tensor:
    """logit_scale rows columns^T + logit_bias in the dtype of rows, also where a scalar is a larger float."""
    logits = scalar_like(logit_scale, rows) * (rows @ columns.T)
    return logits if logit_bias is None else logits + scalar_like(logit_bias, rows)


def without_autocast(device: torch.device) -> AbstractContextManager:
    if device.type == "meta":  # it has no autocast, and asking for it breaks the compiler of torch 2.11
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
