"""What people upload or paint -> square images and masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dalle2_fast.demo.fields import FieldError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PAINTED = 16  # of 255: the alpha from which a pixel counts as painted, for the rim of a brush is soft


def read_image(field: str, file: str | Image | None) -> Tensor:
    """The central square of an uploaded image, float32 [1, 3, S, S] in [0, 1].

    Args:
        field: of the page, for errors.
        file: the path of the upload, or an image; None if there is none.

    Raises:
        FieldError: no file, or one that is no image.

    Example:
        >>> from PIL import Image
        >>> read_image("image", Image.new("RGB", (6, 4))).shape
        torch.Size([1, 3, 4, 4])
    """
    from PIL import Image, UnidentifiedImageError

    from dalle2_fast.data import image_formats
    from dalle2_fast.data.images import central_square, from_pil

    if file is None:
        raise FieldError(field, "expected an image, got none")
    try:
        image = image_formats.open_image(file) if isinstance(file, str) else file
        image.load()
        return central_square(from_pil(image))
    except UnidentifiedImageError:
        raise FieldError(field, "expected an image, got a file that Pillow cannot read as one") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FieldError(field, f"expected a whole image, got a file that cannot be read ({error})") from None


def read_painting(field: str, editor: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
    """The image of an editor and where it was painted on.

    Args:
        field: of the page, for errors.
        editor: `background`, an image, and `layers`, images of its size that are transparent where nothing
            was painted.

    Returns:
        The central square, float32 [1, 3, S, S] in [0, 1], and its mask, bool [1, 1, S, S], True where
        painted.

    Raises:
        FieldError: no image, or nothing painted in its central square.
    """
    import numpy as np
    import torch

    from dalle2_fast.data.images import central_square

    background = (editor or {}).get("background")
    image = read_image(field, background)
    height, width = background.height, background.width
    painted = torch.zeros(height, width, dtype=torch.bool)
    for layer in editor["layers"]:
        if layer.size != background.size:
            layer = layer.resize(background.size)
        alpha = np.array(layer.convert("RGBA").getchannel("A"))
        painted |= torch.from_numpy(alpha) >= PAINTED
    mask = central_square(painted[None, None])
    if not mask.any():
        raise FieldError(field, "expected a painted region, which is what is drawn anew, got none")
    return image, mask
