"""loss = mean_i (H(P[i], softmax L[i, :]) + H(P[i], softmax L[:, i])) / 2,  L = scale I T^T,
P = softmax(scale (I I^T + T T^T) / 2)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.ops import _checks, _dispatch
from dalle2_fast.ops._dtypes import compute_dtype
from dalle2_fast.ops.contrastive_loss import scalar_like, scaled_logits, without_autocast


def soft_contrastive_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    impl: str = "auto",
) -> Tensor:  # scalar
    """`contrastive_loss` with soft targets: pairs that resemble each other are not pushed fully apart.

    The targets are softmax(logit_scale * (I I^T + T T^T) / 2), row by row, for both directions. They carry no
    gradient: otherwise features could lower the loss by moving the targets. Arguments, dtypes and errors as
    `contrastive_loss`.
    """
    _checks.contrastive(image_features, text_features, logit_scale)
    if not _dispatch.use_native(impl, image_features, text_features):
        return soft_contrastive_loss_reference(image_features, text_features, logit_scale)
    tracked = _dispatch.needs_gradient(image_features, text_features, logit_scale)
    scale = scalar_like(logit_scale, image_features)
    return torch.ops.dalle2_fast.soft_contrastive_loss(image_features, text_features, scale, tracked)[0]


def soft_contrastive_loss_reference(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
) -> Tensor:  # scalar
    """mean over i of the cross-entropies of L[i, :] and L[:, i] against P[i, :], halved,
    L = scale I T^T, P = softmax(scale (I I^T + T T^T) / 2) without gradient"""
    dtype = compute_dtype(image_features.dtype)
    with without_autocast(image_features.device):
        image, text = image_features.to(dtype), text_features.to(dtype)
        logits = scaled_logits(image, text, logit_scale, None)
        with torch.no_grad():
            targets = (logit_scale * 0.5 * (image @ image.T + text @ text.T)).softmax(dim=1)
        return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))
