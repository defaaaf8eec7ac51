"""A number per sample next to tensors of any rank."""

from __future__ import annotations

from torch import Tensor


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B, ...] -> [B, ..., 1, 1], which broadcasts over the trailing dimensions of `like`."""
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim()))
