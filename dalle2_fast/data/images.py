"""Pictures in and out: PIL images <-> tensors [B, 3, H, W] in [0, 1], the middle square, another size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def check_images(
    name: str,
    images: Tensor,
    channels: int,
    size: tuple[int, int] | None = None,  # (H, W), None = any
    batch: int | None = None,
    check_range: bool = True,
) -> None:
    """Raise unless `images` is a floating-point [B, channels, H, W] with values in [0, 1].

    Looking at the values makes the host wait for a GPU; a training loop that trusts its data turns it off.
    """
    expected = f"[B, {channels}, H, W]" + (f" with H, W = {size[0]}, {size[1]}" if size else "")
    expected += f" and B = {batch}" if batch is not None else ""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        came = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"{name}: expected a floating-point tensor {expected} with values in [0, 1], got {came}"
        )
    shape = tuple(images.shape)
    if (
        len(shape) != 4
        or shape[1] != channels
        or size not in (None, shape[2:])
        or batch not in (None, shape[0])
    ):
        raise ValueError(f"{name}: expected {expected}, got {shape}")
    if check_range and images.numel():
        low, high = (value.item() for value in images.detach().aminmax())
        if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails, too
            raise ValueError(f"{name}: expected values in [0, 1], got {low:.4g} to {high:.4g}")


def to_pil(images: Tensor) -> list[Image]:
    """float [B, 3, H, W] in [0, 1] -> B PIL images, each value rounded to 8 bits."""
    from PIL import Image

    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def from_pil(picture: Image) -> Tensor:
    """A PIL image of any mode -> float32 [1, 3, H, W] in [0, 1].

    Turned upright as its EXIF says, transparency laid on white.
    """
    picture = canonical(picture)
    pixels = torch.from_numpy(np.array(picture))
    if picture.mode == "F":
        return pixels.expand(1, 3, -1, -1).contiguous()
    return pixels.permute(2, 0, 1)[None].float() / 255


def canonical(picture: Image) -> Image:
    """A PIL image of any mode -> an upright one of mode "RGB", or of mode "F" with values in [0, 1].

    The orientation follows EXIF, and transparency is laid on white. Grey images of more than 8 bits become
    "F", because convert("RGB") cuts their values at 255: "I" and "I;16" hold 0 to 65535, "F" holds 0 to 1.
    """
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        top = 65535.0 if picture.mode.startswith("I") else 1.0
        grey = torch.from_numpy(np.array(picture.convert("F"))) / top
        return Image.fromarray(grey.clamp(0, 1).numpy())
    if is_transparent(picture):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def is_transparent(picture: Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info


def as_images(name: str, given: Tensor | Image | Sequence[Image], device: torch.device) -> Tensor:
    """What a caller calls an image -> float [B, 3, S, S] on `device`.

    given: a tensor [3, S, S] or [B, 3, S, S] in [0, 1], a PIL image, or several of one size; S is any size,
        but the images must be square (see `middle_square`).
    """
    from PIL import Image

    if not isinstance(given, Tensor):
        pictures = list(given) if isinstance(given, Sequence) else [given]
        if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
            raise TypeError(
                f"{name}: expected a tensor [B, 3, S, S] in [0, 1] or PIL images, got {type(given).__name__}"
            )
        tensors = [from_pil(picture) for picture in pictures]
        if len({tensor.shape for tensor in tensors}) > 1:
            sizes = ", ".join(f"{tensor.shape[3]} x {tensor.shape[2]}" for tensor in tensors)
            raise ValueError(f"{name}: expected images of one size, got {sizes}")
        given = torch.cat(tensors)
    images = given[None] if isinstance(given, Tensor) and given.ndim == 3 else given
    check_images(name, images, 3)
    height, width = images.shape[2:]
    if height != width or height == 0 or len(images) == 0:
        raise ValueError(f"{name}: expected at least one square image [B, 3, S, S], got {tuple(given.shape)}")
    return images.to(device)


def middle_square(images: Tensor) -> Tensor:
    """[B, C, H, W] -> the largest square in the middle, [B, C, S, S]."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def resized(images: Tensor, side: int) -> Tensor:  # [B, 3, S, S] -> [B, 3, side, side]
    """Bicubic with antialiasing, kept in [0, 1]; images of this size already are returned as they are."""
    if images.shape[-1] == side:
        return images
    wide = images if images.dtype == torch.float64 else images.float()
    return F.interpolate(wide, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def as_mask(name: str, given: Tensor | Image, device: torch.device) -> Tensor:
    """What a caller calls a mask -> bool [B, 1, S, S] on `device`, True = repaint.

    given: a PIL image, repainted where it is lighter than middle grey, or a tensor of 0 and 1 (or bool) of
        shape [S, S], [1, S, S] or [B, 1, S, S].
    """
    from PIL import Image

    if not isinstance(given, Tensor):
        if not isinstance(given, Image.Image):
            raise TypeError(f"{name}: expected a tensor or a PIL image, got {type(given).__name__}")
        given = from_pil(given).mean(dim=1, keepdim=True) >= 0.5
    mask = given[None] if given.ndim == 3 else given[None, None] if given.ndim == 2 else given
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3] or mask.numel() == 0:
        raise ValueError(f"{name}: expected [B, 1, S, S], [1, S, S] or [S, S], got {tuple(given.shape)}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{name}: expected 0 (keep) and 1 (repaint) only, got other values")
    return mask.bool().to(device)


def resized_mask(mask: Tensor, side: int) -> Tensor:  # bool [B, 1, S, S] -> bool [B, 1, side, side]
    """True wherever any part of the pixel is to be repainted, so that nothing old shines through."""
    size = mask.shape[-1]
    if size == side:
        return mask
    return F.adaptive_max_pool2d(mask.float(), side) > 0  # also to a larger side: each cell sees its source
