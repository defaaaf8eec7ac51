"""Encoded captions: what CLIP or a text tower makes of texts, and what the prior and the decoder take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle2_fast.models.inputs import check_features


@dataclass(frozen=True)
class Caption:
    """A batch of encoded captions."""

    embed: Tensor  # [B, E], one vector per caption
    encodings: Tensor | None = None  # [B, L, D], one vector per token
    mask: Tensor | None = None  # bool [B, L], True = a token

    def expand(self, batch: int) -> Caption:
        """One caption as `batch` equal rows; `batch` captions stay as they are."""
        return Caption(*(None if x is None else x.expand(batch, *x.shape[1:]) for x in self._fields()))

    def followed_by(self, other: Caption) -> Caption:
        """The rows of this batch, then those of `other`; the shorter captions are padded."""
        pairs = zip(self._fields(), other._fields(), strict=True)
        return Caption(*(None if a is None else cat_padded(a, b) for a, b in pairs))

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.embed, self.encodings, self.mask


def check_encodings(
    encodings: Tensor,
    mask: Tensor | None,
    batch: int,
    width: int,
    context_length: int | None = None,
    name: str = "text_encodings",
) -> None:
    """Raise unless encodings are [batch, L, width], L at most context_length, with a mask bool [batch, L]."""
    longest = "L" if context_length is None else f"L <= {context_length}"
    check_features(name, encodings, "B, L, D", (batch, longest, width))
    if context_length is not None and encodings.shape[1] > context_length:
        raise ValueError(f"{name}: expected L <= {context_length} tokens, got {encodings.shape[1]}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != encodings.shape[:2]):
        raise ValueError(
            f"text_mask: expected bool [B, L] = {tuple(encodings.shape[:2])}, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )


def cat_padded(
    above: Tensor,  # [B, L, *] or [B, D]
    below: Tensor,  # [C, M, *] or [C, D]
) -> Tensor:  # [B + C, max(L, M), *]
    """Rows below rows, the shorter ones with zeros (False) behind them."""
    longest = max(above.shape[1], below.shape[1])
    rows = []
    for x in (above, below):
        rest = x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:])
        rows.append(torch.cat([x, rest], dim=1))
    return torch.cat(rows)
