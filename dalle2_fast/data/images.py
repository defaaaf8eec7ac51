"""Images in and out: PIL images <-> tensors [B, 3, H, W] in [0, 1], masks, central squares, sizes, grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.ops._dtypes import compute_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

GRID_GAP = 4  # white pixels between the images of a grid
LABEL_HEIGHT = 14  # pixels of the line of text below an image


def check_images(
    name: str,
    images: Tensor,
    channels: int,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    check_range: bool = True,
) -> None:
    """Raise unless `images` is a floating-point [B, channels, H, W] with values in [0, 1].

    Args:
        name: what the error message calls the argument.
        images: what was passed.
        channels: the expected number of channels.
        size: the expected (H, W); None is any.
        batch: the expected B; None is any.
        check_range: look at the values, for which the host waits for a GPU; a training loop that trusts its
            data turns it off.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape, or values outside [0, 1].
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


# ------------------------------------------------------------------------------------------------- PIL images


def to_pil(images: Tensor) -> list[Image]:
    """float [B, 3, H, W] in [0, 1] -> B PIL images, each value rounded to 8 bits.

    Example:
        >>> [image.size for image in to_pil(torch.rand(2, 3, 4, 6))]
        [(6, 4), (6, 4)]
    """
    from PIL import Image

    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def from_pil(image: Image) -> Tensor:
    """A PIL image of any mode -> float32 [1, 3, H, W] in [0, 1]; see `canonical`."""
    image = canonical(image)
    pixels = torch.from_numpy(np.array(image))
    if image.mode == "F":
        return pixels.expand(1, 3, -1, -1).contiguous()
    return pixels.permute(2, 0, 1)[None].float() / 255


def canonical(image: Image) -> Image:
    """A PIL image of any mode -> an upright one of mode "RGB", or of mode "F" with values in [0, 1].

    The orientation follows EXIF, and transparency is laid on white. Grey images of more than 8 bits become
    "F", because convert("RGB") cuts their values at 255: "I" and "I;16" hold 0 to 65535, "F" holds 0 to 1.
    An image that is already so is returned itself.
    """
    from PIL import ExifTags, Image, ImageOps

    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose copies the others, too
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        top = 65535.0 if image.mode.startswith("I") else 1.0
        grey = torch.from_numpy(np.array(image.convert("F"))) / top
        return Image.fromarray(grey.clamp(0, 1).numpy())
    if is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def is_transparent(image: Image) -> bool:
    """Whether a PIL image has an alpha channel or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def image_grid(
    images: Sequence[Image], *, labels: Sequence[str] | None = None, columns: int | None = None
) -> Image:
    """Images of one size -> one image, with white gaps between them.

    Args:
        images: at least one.
        labels: a line of text below each image.
        columns: images in a row; None makes the grid as square as it can be.

    Example:
        >>> image_grid(to_pil(torch.rand(4, 3, 32, 32))).size
        (68, 68)
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    if labels is not None:  # a line of text that is longer than its image is wide widens all columns
        width = max(width, *(math.ceil(ImageFont.load_default().getlength(text)) + 4 for text in labels))
    line = LABEL_HEIGHT if labels is not None else 0
    size = (columns * (width + GRID_GAP) - GRID_GAP, rows * (height + line + GRID_GAP) - GRID_GAP)
    grid = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        left, top = index % columns * (width + GRID_GAP), index // columns * (height + line + GRID_GAP)
        grid.paste(image, (left, top))
        if labels is not None:
            ImageDraw.Draw(grid).text((left + 2, top + height), labels[index], fill="black")
    return grid


# --------------------------------------------------------------------------------------- what a caller passes


def as_images(name: str, given: Tensor | Image | Sequence[Image], device: torch.device | str) -> Tensor:
    """Images in any form that a caller may pass -> float [B, 3, S, S] on `device`.

    Args:
        name: what an error message calls the argument.
        given: a tensor [3, S, S] or [B, 3, S, S] in [0, 1], a PIL image, or several of one size; S is any
            size, but the images must be square (see `central_square`).
        device: of the result.

    Raises:
        TypeError, ValueError: anything else.
    """
    from PIL import Image

    if not isinstance(given, Tensor):
        images = list(given) if isinstance(given, Sequence) else [given]
        if not images or not all(isinstance(image, Image.Image) for image in images):
            raise TypeError(
                f"{name}: expected a tensor [B, 3, S, S] in [0, 1] or PIL images, got {type(given).__name__}"
            )
        tensors = [from_pil(image) for image in images]
        if len({tensor.shape for tensor in tensors}) > 1:
            sizes = ", ".join(f"{tensor.shape[3]} x {tensor.shape[2]}" for tensor in tensors)
            raise ValueError(f"{name}: expected images of one size, got {sizes}")
        given = torch.cat(tensors)
    batch = given[None] if given.ndim == 3 else given
    check_images(name, batch, 3)
    height, width = batch.shape[2:]
    if height != width or height == 0 or len(batch) == 0:
        raise ValueError(f"{name}: expected at least one square image [B, 3, S, S], got {tuple(given.shape)}")
    return batch.to(device)


def as_mask(name: str, given: Tensor | Image, device: torch.device | str) -> Tensor:
    """A mask in any form that a caller may pass -> bool [B, 1, S, S] on `device`, True = repaint.

    Args:
        name: what an error message calls the argument.
        given: a PIL image, repainted where it is lighter than middle grey, or a tensor of 0 and 1 (or bool)
            of shape [S, S], [1, S, S] or [B, 1, S, S].
        device: of the result.

    Raises:
        TypeError, ValueError: anything else.
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


def expect_one(name: str, rows: Tensor) -> Tensor:
    """`rows`, if it is a batch of one; ValueError if not."""
    if len(rows) != 1:
        raise ValueError(f"{name}: expected one, got {len(rows)}")
    return rows


# ------------------------------------------------------------------------------------------ squares and sizes


def central_square(images: Tensor) -> Tensor:
    """[B, C, H, W] -> the largest square in the middle, [B, C, S, S]."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def resized(images: Tensor, side: int) -> Tensor:
    """[B, 3, S, S] -> [B, 3, side, side] in [0, 1], bicubic with antialiasing.

    Images that have this size are returned as they are.
    """
    if images.shape[-1] == side:
        return images
    images = images.to(compute_dtype(images.dtype))
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def resized_mask(mask: Tensor, side: int) -> Tensor:
    """bool [B, 1, S, S] -> bool [B, 1, side, side].

    True where any part of the pixel is to be repainted, so that no pixel mixes with what is to go.
    """
    size = mask.shape[-1]
    if size == side:
        return mask
    return F.adaptive_max_pool2d(mask.float(), side) > 0  # also for a larger side: each cell sees its source


def to_square(image: Image, resolution: int) -> Tensor:
    """The central square of an image, reduced by area, or enlarged bicubically, to `resolution` pixels.

    Args:
        image: of any mode; see `canonical`.
        resolution: the side of the result, in pixels.

    Returns:
        uint8 [3, resolution, resolution].

    Example:
        >>> from PIL import Image
        >>> to_square(Image.new("RGB", (40, 30), "red"), 2)[:, 0, 0]
        tensor([255,   0,   0], dtype=torch.uint8)
    """
    from PIL import Image

    image = canonical(image)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # The box does not depend on the resolution, so that images of different sizes stay aligned.
    method = Image.Resampling.BOX if side >= resolution else Image.Resampling.BICUBIC
    image = image.resize((resolution, resolution), method, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image))
    if image.mode == "F":  # in [0, 1] except for bicubic overshoot
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)
    return pixels.permute(2, 0, 1)
