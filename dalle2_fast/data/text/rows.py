"""Rows of token ids: what both tokenizers check and build in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_context_length(context_length: int) -> None:
    """Raise ValueError unless a row has room for begin, one token and end."""
    if not isinstance(context_length, int) or context_length < 3:
        raise ValueError(f"context_length: expected an int >= 3, got {context_length!r}")


def encode_rows(
    captions: str | Sequence[str],
    encode: Callable[[str], list[int]],
    context_length: int,
    unknown: str,
) -> Tensor:
    """One row of ids per caption.

    Args:
        captions: one or several.
        encode: caption -> its row of context_length ids.
        context_length: ids per row.
        unknown: must be "error" or "token".

    Returns:
        int64 [captions, context_length].

    Raises:
        TypeError: a caption is not a str.
        ValueError: `unknown` is something else.

    Example:
        >>> encode_rows(["a", "bc"], lambda caption: [1, len(caption), 2], 3, unknown="error")
        tensor([[1, 1, 2],
                [1, 2, 2]])
    """
    if unknown not in ("error", "token"):
        raise ValueError(f'unknown: expected "error" or "token", got {unknown!r}')
    rows = []
    for caption in [captions] if isinstance(captions, str) else list(captions):
        if not isinstance(caption, str):
            raise TypeError(f"captions: expected str, got {type(caption).__name__}")
        rows.append(encode(caption))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), context_length)


def checked_ids(row: Tensor | Sequence[int], vocab_size: int) -> list[int]:
    """The ids of one row [L] as ints; ValueError for another shape or an id outside of the vocabulary.

    Example:
        >>> checked_ids(torch.tensor([1, 5, 2]), vocab_size=6)
        [1, 5, 2]
    """
    if isinstance(row, Tensor) and row.dim() != 1:
        raise ValueError(f"row: expected [L], got {tuple(row.shape)}")
    ids = [int(index) for index in row]
    if bad := [index for index in ids if not 0 <= index < vocab_size]:
        raise ValueError(f"row: expected ids from 0 to {vocab_size - 1}, got {bad[0]}")
    return ids
