"""CLIP's loss with hard-negative captions, which only widen the softmax row of the image they belong to.

Source: Yuksekgonul et al., "NegCLIP", 2210.01936.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_negatives(text: Tensor, negative_text: Tensor, negative_mask: Tensor | None) -> None:
    """Raise ValueError unless there are K negatives [B, K, L] for text [B, L], with a mask bool [B, K]."""
    batch, length = text.shape
    if negative_text.ndim != 3 or negative_text.shape[0] != batch or negative_text.shape[2] != length:
        came = tuple(negative_text.shape)
        raise ValueError(f"negative_text: expected [B, K, L] = ({batch}, K, {length}), got {came}")
    if negative_mask is not None and (
        negative_mask.dtype != torch.bool or negative_mask.shape != negative_text.shape[:2]
    ):
        raise ValueError(
            f"negative_mask: expected bool [B, K] = {tuple(negative_text.shape[:2])}, "
            f"got {negative_mask.dtype} {tuple(negative_mask.shape)}"
        )


def loss_with_negatives(
    image_features: Tensor,  # [B, D], unit norm
    text_features: Tensor,  # [B, D], unit norm
    negative_features: Tensor,  # [B, K, D], unit norm
    negative_mask: Tensor | None,  # bool [B, K]
    scale: Tensor,
) -> Tensor:
    """The symmetric contrastive loss, a scalar, with K more columns in the softmax over the captions.

    Example:
        >>> embeddings, negatives = torch.eye(2), torch.zeros(2, 1, 2)
        >>> loss_with_negatives(embeddings, embeddings, negatives, None, torch.tensor(10.0)).shape
        torch.Size([])
    """
    # Autocast would round the cosines to bfloat16, whose steps near 1 exceed a hard negative's margin.
    with torch.autocast(image_features.device.type, enabled=False):
        logits = scale * image_features @ text_features.T
        extra = scale * (negative_features @ image_features[:, :, None]).squeeze(-1)
        if negative_mask is not None:
            extra = extra.masked_fill(~negative_mask, float("-inf"))
        target = torch.arange(len(logits), device=logits.device)
        by_image = F.cross_entropy(torch.cat([logits, extra], dim=1), target)
        return (by_image + F.cross_entropy(logits.T, target)) / 2
