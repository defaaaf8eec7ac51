"""Random windows of images, to train a network of convolutions on a part of each."""

from __future__ import annotations

import torch
from torch import Tensor


def random_crops(
    crop: int | float,
    multiple: int,
    generator: torch.Generator | None,
    image: Tensor,  # [B, C, H, W]
    *others: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The same random crop x crop window of each image's tensors; None stays None.

    crop: in pixels, or as a part of the shorter side; rounded to, or a multiple of, `multiple`.
    """
    batch, _, height, width = image.shape
    largest = min(height, width)
    if isinstance(crop, float):
        if not 0.0 < crop <= 1.0:
            raise ValueError(f"crop: expected a part of the side in (0, 1], or an int, got {crop}")
        crop = max(multiple, round(crop * largest / multiple) * multiple)
    if not 0 < crop <= largest or crop % multiple:
        raise ValueError(f"crop: expected a multiple of {multiple} up to {largest}, got {crop}")
    device = image.device
    drawn_on = generator.device if generator is not None else "cpu"

    def window(length: int) -> Tensor:
        start = torch.randint(length - crop + 1, (batch, 1), generator=generator, device=drawn_on)
        return start.to(device) + torch.arange(crop, device=device)

    rows, columns = window(height)[:, None, :, None], window(width)[:, None, None, :]
    owner = torch.arange(batch, device=device)[:, None, None, None]

    def cut(x: Tensor) -> Tensor:
        return x[owner, torch.arange(x.shape[1], device=device)[:, None, None], rows, columns]

    return tuple(None if x is None else cut(x) for x in (image, *others))
