"""Encoded captions: what CLIP or a text tower makes of texts, and what the prior and the decoder take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle2_fast.models.inputs import check_features


@dataclass(frozen=True)
class Caption:
    """A batch of encoded captions.

    Args:
        embed: one vector per caption, [B, E].
        encodings: one vector per token, [B, L, D]; None if only the embedding is known.
        mask: bool [B, L], True = a token, False = padding; None if every position is a token.

    Example:
        >>> one = Caption(torch.ones(1, 4), torch.ones(1, 3, 6), torch.ones(1, 3, dtype=torch.bool))
        >>> one.expand(2).encodings.shape
        torch.Size([2, 3, 6])
    """

    embed: Tensor  # [B, E]
    encodings: Tensor | None = None  # [B, L, D]
    mask: Tensor | None = None  # bool [B, L]

    def expand(self, batch: int) -> Caption:
        """Return one caption as `batch` equal rows; `batch` captions stay as they are."""
        return Caption(*(None if x is None else x.expand(batch, *x.shape[1:]) for x in self._fields()))

    def followed_by(self, other: Caption) -> Caption:
        """Return the rows of this batch, then those of `other`; the shorter captions are padded."""
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
    """Raise unless the encodings of captions and their mask have the expected shapes.

    Args:
        encodings: expected floating, [batch, L, width].
        mask: expected bool [batch, L], or None.
        batch: the number of captions.
        width: the width of an encoding.
        context_length: the largest L; None for any.
        name: the name of the encodings, for the message.

    Raises:
        TypeError: the encodings are not a floating-point tensor.
        ValueError: a shape or the dtype of the mask is wrong.

    Example:
        >>> check_encodings(torch.zeros(2, 5, 8), None, batch=2, width=8, context_length=5)
    """
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
    """Concatenate rows of different lengths; the shorter rows are padded with zeros (False).

    Example:
        >>> cat_padded(torch.ones(1, 3), torch.ones(1, 2))
        tensor([[1., 1., 1.],
                [1., 1., 0.]])
    """
    longest = max(above.shape[1], below.shape[1])
    rows = []
    for x in (above, below):
        rest = x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:])
        rows.append(torch.cat([x, rest], dim=1))
    return torch.cat(rows)
