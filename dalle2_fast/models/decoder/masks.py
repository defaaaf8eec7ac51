"""Random inpainting masks for training: everything, some boxes, or everything outside of a box.

In the whole package a mask is 1 (True) where the image is repainted and 0 (False) where it is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.draws import draw

_EVERYTHING, _OUTSIDE = 0.2, 0.2  # fractions of the masks; the others are boxes
_BOXES = 4  # the largest number of boxes


def draw_masks(
    batch: int,
    height: int,
    width: int,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # bool [B, 1, height, width]
    """Draw random masks for training an inpainting decoder.

    A fifth of the masks covers the whole image, so that the decoder still learns to sample from noise alone.
    A fifth covers everything outside of one box. The others are the union of one to four boxes whose sides
    are 1/8 to 3/4 of the image.

    Args:
        batch: the number of masks.
        height: height of the images in pixels.
        width: width of the images in pixels.
        device: where the masks are wanted.
        generator: source of the random numbers; None is torch's default generator.

    Returns:
        bool [B, 1, height, width], True = repaint.

    Source: Nichol et al., "GLIDE", 2112.10741, section 3.3, which erases random regions.

    Example:
        >>> draw_masks(2, 8, 8).shape
        torch.Size([2, 1, 8, 8])
    """
    # A generator can only draw on its device, which need not be the device of the data.
    drawn_on = generator.device if generator is not None else device
    u = draw(torch.rand, (batch, 2 + 4 * _BOXES), generator, device=drawn_on).to(device)
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
