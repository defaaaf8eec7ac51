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

    For both directions the targets are softmax(logit_scale * (I I^T + T T^T) / 2), row by row. They carry no
    gradient: otherwise the loss could be lowered by moving the targets.

    Args:
        image_features: floating [N, D], usually of unit norm.
        text_features: floating [N, D]; row i belongs to row i of image_features.
        logit_scale: factor of the inner products: a number or a scalar tensor.
        impl: "auto", "reference" or "fused".

    Returns:
        A float32 scalar (float64 for float64 features). The maths is float32 also under autocast.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device, or N or D is 0.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Shariatnia, "Simple CLIP", 2021 (github.com/moein-shariatnia/OpenAI-CLIP), where the targets carry
    a gradient.

    Example:
        >>> from dalle2_fast import functional
        >>> features = torch.eye(4)
        >>> round(functional.soft_contrastive_loss(features, features, logit_scale=0.0).item(), 4)
        1.3863
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
        # detach also stops forward-mode tangents, which torch.no_grad() lets through.
        image, text, scale = image.detach(), text.detach(), scalar_like(logit_scale, image).detach()
        targets = (scale * 0.5 * (image @ image.T + text @ text.T)).softmax(dim=1)
        return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))
