"""Keys and values of a U-Net's context, made once for all its attention layers and all sampling steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ContextCache:
    """Keys and values of one context for every attention layer of one U-Net, made by `UNet.encode_context`.

    They do not depend on the timestep, so a sampling run makes them once and passes this object where the
    context itself would go.
    """

    keys: tuple[Tensor, ...]  # one [B, heads, S, head_dim] per attention layer
    values: tuple[Tensor, ...]
    mask: Tensor | None  # bool [B, S], True = attend


class ContextReader:
    """Hands each attention layer its keys and values in turn."""

    def __init__(self, cache: ContextCache | None):
        self.mask = None if cache is None else cache.mask
        self.pairs = None if cache is None else iter(zip(cache.keys, cache.values, strict=True))

    def next(self) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        return (None, None) if self.pairs is None else (next(self.pairs), self.mask)
