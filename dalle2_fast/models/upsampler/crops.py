"""Random windows of images, so that a network of convolutions can train on a part of each image."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dalle2_fast.draws import draw


def random_crops(
    crop: int | float,
    multiple: int,
    generator: torch.Generator | None,
    image: Tensor,  # [B, C, H, W]
    *others: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Cut a random crop x crop window out of each image, and the same window out of other tensors.

    Args:
        crop: side of the window: an int in pixels, a multiple of `multiple`, or a float in (0, 1], the
            fraction of the shorter side of the image, which is rounded to a multiple.
        multiple: the factor by which the network reduces the resolution.
        generator: source of the random numbers; None is torch's default generator.
        image: the images.
        others: tensors of the same batch and size; None stays None.

    Returns:
        The windows of the image and of the others.

    Raises:
        ValueError: crop is too large, or not a multiple.

    Example:
        >>> image, weight = random_crops(4, 2, None, torch.rand(2, 3, 8, 8), None)
        >>> image.shape, weight
        (torch.Size([2, 3, 4, 4]), None)
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
        integers = partial(torch.randint, length - crop + 1)
        start = draw(integers, (batch, 1), generator, device=drawn_on)
        return start.to(device) + torch.arange(crop, device=device)

    rows, columns = window(height)[:, None, :, None], window(width)[:, None, None, :]
    owner = torch.arange(batch, device=device)[:, None, None, None]

    def cut(x: Tensor) -> Tensor:
        return x[owner, torch.arange(x.shape[1], device=device)[:, None, None], rows, columns]

    return tuple(None if x is None else cut(x) for x in (image, *others))
