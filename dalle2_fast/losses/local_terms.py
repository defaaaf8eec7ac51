"""The terms of a loss that one process computes: its n rows against all or some of the texts.

Each function runs the op of dalle2_fast._C, or the same formula in plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.ops import _dispatch


def contrastive_lse(
    image: Tensor,  # [n, D]
    texts: Tensor,  # [N, D]
    scale: Tensor,
    first: int,  # the index of row 0's text
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """row_lse [n], column_lse [N] over these rows only, and the logits L[i, first + i] [n]."""
    if _dispatch.use_native(impl, image, texts):
        return torch.ops.dalle2_fast.contrastive_lse(image, texts, scale, first)
    with torch.autocast(image.device.type, enabled=False):
        logits = scale * (image.to(scale.dtype) @ texts.to(scale.dtype).T)
        return logits.logsumexp(1), logits.logsumexp(0), logits.diagonal(first)[: len(image)]


def contrastive_gradient(
    image: Tensor,  # [n, D]
    texts: Tensor,  # [N, D]
    scale: Tensor,
    row_lse: Tensor,  # [n]
    column_lse: Tensor,  # [N]
    first: int,  # the index of row 0's text
    row_weight: float,
    column_weight: float,
    grad: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_image in its dtype, d_texts and d_scale, the gradients of `grad` times the sum of

    - row_weight sum (row_lse[i] - L[i, first + i]) over these rows,
    - the part of these rows in column_weight sum (column_lse[j] - L[image of j, j]) over all texts.
    """
    if _dispatch.use_native(impl, image, texts):
        return torch.ops.dalle2_fast.contrastive_gradient(
            image, texts, scale, row_lse, column_lse, first, row_weight, column_weight, grad
        )
    with torch.autocast(image.device.type, enabled=False):
        rows, texts = image.to(scale.dtype), texts.to(scale.dtype)
        products = rows @ texts.T
        logits = scale * products
        d_logits = row_weight * (logits - row_lse[:, None]).exp()
        d_logits += column_weight * (logits - column_lse).exp()
        d_logits.diagonal(first)[: len(image)].sub_(row_weight + column_weight)
        d_logits *= grad
        d_image, d_texts = scale * d_logits @ texts, scale * d_logits.T @ rows
        return d_image.to(image.dtype), d_texts, (d_logits * products).sum()


def sigmoid_loss(
    image: Tensor,  # [n, D]
    texts: Tensor,  # [m, D]
    scale: Tensor,
    bias: Tensor,
    first: int,  # the index of row 0's text
    negatives_only: bool,
    gradients: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of these rows, divided by n, and d_image, d_texts, d_scale, d_bias."""
    if _dispatch.use_native(impl, image, texts):
        return torch.ops.dalle2_fast.sigmoid_loss(image, texts, scale, bias, first, negatives_only, gradients)
    with torch.autocast(image.device.type, enabled=False):
        image, texts = image.to(scale.dtype), texts.to(scale.dtype)
        products = image @ texts.T
        signs = torch.full_like(products, -1)
        if not negatives_only:
            signs.diagonal(first)[: len(image)].fill_(1)
        signed = signs * (scale * products + bias)
        d_logits = -signs * torch.sigmoid(-signed) / len(image)
        loss = -F.logsigmoid(signed).sum() / len(image)
        d_image, d_texts = scale * d_logits @ texts, scale * d_logits.T @ image
        return loss, d_image, d_texts, (d_logits * products).sum(), d_logits.sum()
