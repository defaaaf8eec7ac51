"""Uploaded files -> images within limits, and pictures -> files of a format."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from dalle2_fast.serving.errors import ApiError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("png", "jpeg", "webp")  # that are written, and that are read from a client
QUALITY = 95  # of JPEG and WebP


def decode_upload(data: bytes, param: str, max_pixels: int) -> Image:
    """The image in an uploaded file.

    Args:
        data: the file.
        param: its field, for messages.
        max_pixels: width times height that is allowed, which is looked at before any pixel is decoded.

    Returns:
        The first frame, upright.

    Raises:
        ApiError: 400 for what is not a square image of one of FORMATS within the limit.

    Example:
        >>> try:
        ...     decode_upload(b"GIF89a", "image", 100)
        ... except ApiError as error:
        ...     print(error.message)
        image: expected an image as PNG, JPEG or WEBP, got a file that is none of these
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    def refuse(sentence: str) -> ApiError:
        return ApiError(400, f"{param}: {sentence}", param=param, code="invalid_image_file")

    try:
        # Only these three of Pillow's fifty formats: each decoder is code that a hostile file may reach.
        image = Image.open(io.BytesIO(data), formats=[kind.upper() for kind in FORMATS])
        if image.width * image.height > max_pixels:
            size = f"{image.width} x {image.height}"
            raise refuse(f"expected at most {max_pixels:,} pixels, got {size}")
        image.load()
        upright = ImageOps.exif_transpose(image)
    except ApiError:
        raise
    except UnidentifiedImageError:
        raise refuse("expected an image as PNG, JPEG or WEBP, got a file that is none of these") from None
    except Exception as error:  # damaged files make Pillow raise nearly any exception
        raise refuse(f"expected a whole image, got a file that cannot be read ({error})") from None
    if upright.width != upright.height:
        raise refuse(f"expected a square image, got {upright.width} x {upright.height}")
    return upright


def encode_picture(image: Image, kind: str) -> bytes:
    """The file of a picture; `kind` is one of FORMATS.

    Example:
        >>> from PIL import Image
        >>> encode_picture(Image.new("RGB", (4, 4)), "jpeg")[:3].hex()
        'ffd8ff'
    """
    file = io.BytesIO()
    options = {} if kind == "png" else {"quality": QUALITY}
    image.save(file, format=kind.upper(), **options)
    return file.getvalue()
