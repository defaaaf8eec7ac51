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

    Fused, the N^2 logits exist a tile at a time: beside the gradients it takes a workspace of 16 MB on the
    CPU and 256 MB on a GPU, whatever N is. It then has no second derivative.

    Args:
        image_features, text_features: floating; row i of one belongs to row i of the other. Usually of unit
            norm.
        logit_scale: factor of the inner products (a temperature's inverse, already exponentiated).
        logit_bias: added to every logit (it cancels; accepted because open_clip does).
        impl: "auto", "reference" or "fused".

    Returns:
        A float32 scalar (float64 for float64 features). The maths is float32 also under autocast.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or the batch is empty.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Radford et al., 2103.00020, figure 3.
    """
    _checks.contrastive(image_features, text_features, logit_scale, logit_bias)
    if not _dispatch.use_native(impl, image_features, text_features):
        return contrastive_loss_reference(image_features, text_features, logit_scale, logit_bias)
    scale = scalar_like(logit_scale, image_features)
    loss = torch.ops.dalle2_fast.contrastive_loss(image_features, text_features, scale)[0]
    if isinstance(logit_bias, Tensor):  # it cancels; its gradient is 0, not None
        loss = loss + 0 * logit_bias.to(loss).reshape(())
    return loss


def scalar_like(value: Tensor | float, like: Tensor) -> Tensor:
    """[], on the device of `like` and in the dtype of sums of its values."""
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
    logits = logit_scale * (rows @ columns.T)
    return logits if logit_bias is None else logits + logit_bias


def without_autocast(device: torch.device) -> AbstractContextManager:
    if device.type == "meta":  # knows no autocast; to ask torch for it would break torch 2.11's compiler
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
