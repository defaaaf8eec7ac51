"""Masks of diffusers' attention: which keys all queries of a row see."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_MASKED = -1000.0  # in an additive mask: exp(-1000) is zero in every dtype; diffusers writes -10000


def is_key_mask(mask: Tensor | None, batch: int) -> bool:
    """Whether a mask selects the same keys for all queries: None, [B, S] or [B, 1, S].

    It is boolean, with True = attend, or additive as diffusers' U-Nets make it, with 0 = attend and
    -10000 = do not attend.
    """
    if mask is None:
        return True
    return mask.shape[0] == batch and (mask.dim() == 2 or (mask.dim() == 3 and mask.shape[1] == 1))


# The last mask, its version and the result: all attention modules of a forward pass get the same mask.
_last: tuple[weakref.ref, int, Tensor] | None = None


def visible_keys(mask: Tensor | None, keys: int) -> Tensor | None:  # -> bool [B, S]
    """A key mask as booleans. RuntimeError, on the device, if an additive one has other values."""
    global _last
    if mask is None:
        return None
    if mask.shape[-1] != keys:
        raise ValueError(
            f"attention_mask: expected [B, 1, S] = ({mask.shape[0]}, 1, {keys}), got {tuple(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return mask.flatten(1)
    if torch.compiler.is_compiling() or mask.is_inference():
        return _as_bool(mask)
    last = _last  # read once, because another thread may replace it
    if last is None or last[0]() is not mask or last[1] != mask._version:
        _last = last = (weakref.ref(mask), mask._version, _as_bool(mask))
    return last[2]


def _as_bool(mask: Tensor) -> Tensor:
    visible = mask == 0
    # A value in between is a bias, which would be lost. The check runs on the device and waits for nothing.
    torch._assert_async(
        (visible | (mask <= _MASKED)).all(),
        f"attention_mask: expected 0 (attend) or at most {_MASKED:.0f}; other biases need attention=False",
    )
    # A row without a visible key adds the same number to all scores, so the softmax is that of no mask.
    return (visible | ~visible.any(dim=-1, keepdim=True)).flatten(1)
