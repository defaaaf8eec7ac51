"""What the samplers of all networks in this folder do alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.data.images import check_images
from dalle2_fast.models.inputs import resolve_seeds
from dalle2_fast.ops._dtypes import compute_dtype

Net = Callable[[Tensor, Tensor], Tensor]


def to_unit_range(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped.

    Example:
        >>> to_unit_range(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return ((images + 1) / 2).clamp(0, 1)


def sampling_inputs(
    weight: Tensor, batch: int, seeds: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, dict]:
    """The seeds of a batch, and the device and dtype in which a network with this weight is sampled.

    The state stays in float32 also for half-precision weights, whose rounding would swamp small steps.

    Example:
        >>> seeds, place = sampling_inputs(torch.zeros(1), 2, torch.tensor([1, 2]), None)
        >>> place["dtype"]
        torch.float32
    """
    seeds = resolve_seeds(seeds, batch, weight.device, generator)
    return seeds, dict(device=weight.device, dtype=compute_dtype(weight.dtype))


def check_low_res(image: Tensor | None, size: int | None, channels: int = 3) -> None:
    """Raise ValueError unless a low-resolution image was passed exactly where one of `size` is needed.

    Example:
        >>> check_low_res(torch.zeros(1, 3, 8, 8), 8)
    """
    if size is None:
        if image is not None:
            raise ValueError("low_res: expected None, because this network does not enlarge images")
        return
    if image is None:
        raise ValueError(f"low_res: expected [B, {channels}, {size}, {size}] in [0, 1], got None")
    check_images("low_res", image, channels)


def enlarged_to(low_res: Tensor, height: int, width: int) -> Tensor:
    """Enlarge [B, C, h, w] bilinearly, as guided-diffusion and GLIDE do inside of their networks.

    Example:
        >>> enlarged_to(torch.zeros(1, 3, 2, 2), 8, 8).shape
        torch.Size([1, 3, 8, 8])
    """
    return F.interpolate(low_res, (height, width), mode="bilinear", align_corners=False)
