"""loss = sum_ij -log sigmoid(z[i, j] L[i, j]) / N,  L = scale I T^T + bias, z = 1 where i = j, else -1"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.ops import _checks, _dispatch
from dalle2_fast.ops._dtypes import compute_dtype
from dalle2_fast.ops.contrastive_loss import scalar_like, scaled_logits, without_autocast


def sigmoid_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    impl: str = "auto",
) -> Tensor:  # scalar
    """SigLIP's loss: each of the N^2 pairs is a binary question. The sum over pairs is divided by N.

    Args:
        image_features: floating [N, D], usually of unit norm.
        text_features: floating [N, D]; row i belongs to row i of image_features.
        logit_scale: factor of the inner products: a number or a scalar tensor.
        logit_bias: number or scalar tensor that is added to every logit; SigLIP's training starts with -10.
        impl: "auto", "reference" or "fused".

    Returns:
        A float32 scalar (float64 for float64 features). The maths is float32 also under autocast.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device, or N or D is 0.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Zhai et al., 2303.15343, equation 1.

    Example:
        >>> from dalle2_fast import functional
        >>> features = torch.eye(4)
        >>> loss = functional.sigmoid_loss(features, features, logit_scale=10.0, logit_bias=-5.0)
        >>> round(loss.item(), 4)
        0.0269
    """
    _checks.contrastive(image_features, text_features, logit_scale, logit_bias)
    if logit_bias is None:
        raise TypeError("logit_bias: expected a number or a scalar tensor, got None")
    if not _dispatch.use_native(impl, image_features, text_features):
        return sigmoid_loss_reference(image_features, text_features, logit_scale, logit_bias)
    tracked = _dispatch.needs_gradient(image_features, text_features, logit_scale, logit_bias)
    scale, bias = scalar_like(logit_scale, image_features), scalar_like(logit_bias, image_features)
    op = torch.ops.dalle2_fast.sigmoid_loss
    return op(image_features, text_features, scale, bias, 0, False, tracked)[0]


def sigmoid_loss_reference(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
) -> Tensor:  # scalar
    """sum over i, j of -log sigmoid(z L[i, j]) / N, z = 1 on the diagonal and -1 elsewhere"""
    dtype = compute_dtype(image_features.dtype)
    with without_autocast(image_features.device):
        logits = scaled_logits(image_features.to(dtype), text_features.to(dtype), logit_scale, logit_bias)
        signs = 2 * torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device) - 1
        return -F.logsigmoid(signs * logits).sum() / logits.shape[0]
