"""Inpainting masks: 1 (True) where the picture is to be repainted, 0 (False) where it is kept. Everywhere.

Training draws them at random: everything, some boxes, or everything outside of a box.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EVERYTHING, _OUTSIDE = 0.2, 0.2  # shares; the rest are boxes
_BOXES = 4  # at most


def draw_masks(
    batch: int,
    height: int,
    width: int,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # bool [B, 1, height, width]
    """Random masks for training an inpainting decoder (GLIDE, 2112.10741, section 3.3, erases at random).

    A fifth ask for the whole picture, so that the decoder goes on drawing from nothing; a fifth for all that
    is outside of one box; the rest for the union of one to four boxes, each side 1/8 to 3/4 of the picture's.
    """
    # A generator draws on its own device, which need not be the data's.
    drawn_on = generator.device if generator is not None else device
    u = torch.rand(batch, 2 + 4 * _BOXES, generator=generator, device=drawn_on).to(device)
    kind, count = u[:, 0], 1 + (u[:, 1] * _BOXES).long().clamp(max=_BOXES - 1)
    where = u[:, 2:].unflatten(1, (_BOXES, 4))

    def inside(length: int, size: Tensor, place: Tensor) -> Tensor:  # [B, boxes] each -> bool [B, boxes, L]
        extent = ((0.125 + 0.625 * size) * length).ceil().clamp(max=length)
        begin = (place * (length - extent + 1)).floor()
        cells = torch.arange(length, device=begin.device)
        return (cells >= begin[..., None]) & (cells < (begin + extent)[..., None])

    rows = inside(height, where[..., 0], where[..., 1])[..., :, None]
    columns = inside(width, where[..., 2], where[..., 3])[..., None, :]
    boxes = rows & columns  # [B, boxes, H, W]
    drawn = torch.arange(_BOXES, device=boxes.device) < count[:, None]
    union = (boxes & drawn[..., None, None]).any(dim=1)
    kind = kind[:, None, None]
    mask = torch.where(kind < _EVERYTHING + _OUTSIDE, ~boxes[:, 0], union) | (kind < _EVERYTHING)
    return mask[:, None]
