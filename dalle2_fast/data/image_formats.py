"""The formats of image files that are read. It imports no torch, so a missing file is reported at once."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

REFUSED = ("EPS",)  # PostScript is a program, for which Pillow starts Ghostscript


def open_image(file: str | PathLike | BinaryIO) -> Image:
    """Open an image of any format that Pillow reads except PostScript; its pixels are read when used.

    Args:
        file: a path, or a file that is open for reading.

    Raises:
        OSError: the file does not exist or is no image (PIL.UnidentifiedImageError).
        PIL.Image.DecompressionBombError: the image promises more than 179 million pixels.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (3, 2)).save(file, "PNG")
        >>> open_image(file).size
        (3, 2)
    """
    from PIL import Image

    Image.init()
    return Image.open(file, formats=[kind for kind in Image.ID if kind not in REFUSED])
