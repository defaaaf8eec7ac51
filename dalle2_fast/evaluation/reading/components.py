"""Connected components of binary masks, and the two morphological steps that go with them, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

# Areas of objects as parts of the canvas.
MIN_AREA = 0.0065  # a third of the smallest object; anything smaller is a speck
MIN_INNER_AREA = 0.6 * MIN_AREA  # of a region that has lost its outline
LARGE_AREA = 0.08  # more than any medium object


def label_components(mask: Tensor) -> Tensor:
    """Number the 4-connected components of each mask.

    The number is the flat index of the component's last pixel, so label // (H * W) is the image. Labels
    spread to the neighbours and then jump to the label of the pixel they name, which halves the distance
    that is left.

    Args:
        mask: bool [n, H, W].

    Returns:
        int64 [n, H, W]: -1 outside the mask; inside, one number per component, unique over the whole batch.

    Example:
        >>> label_components(torch.tensor([[[True, True, False, True]]]))
        tensor([[[ 1,  1, -1,  3]]])
    """
    label = torch.arange(mask.numel(), device=mask.device).view(mask.shape).masked_fill(~mask, -1)
    while True:
        spread = label.clone()
        for axis in (1, 2):
            size = mask.shape[axis] - 1
            for here, there in ((0, 1), (1, 0)):
                target = spread.narrow(axis, here, size)
                torch.maximum(target, label.narrow(axis, there, size), out=target)
        spread.masked_fill_(~mask, -1)
        spread = torch.where(mask, spread.flatten()[spread.clamp_min(0)], -1)
        if torch.equal(spread, label):
            return label
        label = spread


def find_components(
    mask: Tensor,  # bool [n, H, W]
    min_pixels: float,
) -> tuple[Tensor, Tensor]:
    """Components of at least `min_pixels`: their images int64 [N] (ascending) and masks bool [N, H, W]."""
    label = label_components(mask)
    roots, sizes = torch.unique(label[mask], return_counts=True)
    roots = roots[sizes >= min_pixels]
    image = roots // (mask.shape[1] * mask.shape[2])
    return image, label[image] == roots[:, None, None]


def dilate(mask: Tensor, radius: int = 1) -> Tensor:
    """bool [n, H, W]: grown by `radius` pixels in all eight directions."""
    for _ in range(radius):
        tall = mask.clone()
        tall[:, 1:] |= mask[:, :-1]
        tall[:, :-1] |= mask[:, 1:]
        mask = tall.clone()
        mask[:, :, 1:] |= tall[:, :, :-1]
        mask[:, :, :-1] |= tall[:, :, 1:]
    return mask


def erode(mask: Tensor) -> Tensor:
    """bool [n, H, W]: without the pixels that touch the outside; the edge of the image is not outside."""
    return ~dilate(~mask)


def holes(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What each mask encloses: rows int64 [N] of `mask`, and the holes bool [N, H, W]."""
    row, hole = find_components(~mask, 1)
    frame = hole[:, 0].any(1) | hole[:, -1].any(1) | hole[:, :, 0].any(1) | hole[:, :, -1].any(1)
    return row[~frame], hole[~frame]
