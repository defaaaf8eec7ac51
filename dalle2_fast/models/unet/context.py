"""Keys and values of the context of a U-Net, computed once for all layers and all sampling steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ContextCache:
    """Keys and values of one context for every attention layer of one U-Net, from `UNet.encode_context`.

    They do not depend on the timestep. A sampling run therefore computes them once and passes this object in
    place of the context.

    Args:
        keys: one tensor [B, heads, S, head_dim] per attention layer.
        values: the same for the values.
        mask: bool [B, S], True = attend; None if every position counts.

    Example:
        >>> import torch
        >>> k, v = (torch.randn(2, 4, 77, 64) for _ in "kv")  # of a U-Net with one attention layer
        >>> ContextCache((k,), (v,), mask=None).first(1).keys[0].shape
        torch.Size([1, 4, 77, 64])
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None

    def first(self, rows: int) -> ContextCache:
        """The cache of the first `rows` rows of the batch, without a copy."""
        keys, values = (tuple(x[:rows] for x in tensors) for tensors in (self.keys, self.values))
        return ContextCache(keys, values, None if self.mask is None else self.mask[:rows])


class ContextReader:
    """Gives each attention layer its keys and values, in the order of the layers.

    Args:
        cache: the keys and values; None for a U-Net without context.

    Example:
        >>> ContextReader(None).next()
        (None, None)
    """

    def __init__(self, cache: ContextCache | None):
        self.mask = None if cache is None else cache.mask
        self.pairs = None if cache is None else iter(zip(cache.keys, cache.values, strict=True))

    def next(self) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """(keys, values) of the next attention layer, and the mask."""
        return (None, None) if self.pairs is None else (next(self.pairs), self.mask)
