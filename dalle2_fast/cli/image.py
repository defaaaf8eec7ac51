"""Pictures that a command is given: opened with Pillow, made square, and what was done to them said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def open_image(path: Path, argument: str) -> Image:
    """The picture in a file, whole and upright; errors name the argument and the file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = Image.open(path)
        picture.load()  # opening reads the header only
        picture = ImageOps.exif_transpose(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"{argument}: no such file: {path}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{argument}: {path} is a folder, expected a picture") from None
    except UnidentifiedImageError:
        raise ValueError(f"{argument}: {path} is not a picture that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{argument}: {path} cannot be read ({error})") from None
    return picture


def square(picture: Image, path: Path, side: int) -> tuple[Tensor, str | None]:
    """float32 [1, 3, S, S] in [0, 1], upright, transparency laid on white, and a note on what is done to it.

    side: the size at which the chain looks at it; it does the resizing.
    """
    from dalle2_fast.data.images import from_pil, is_transparent, middle_square

    whole = from_pil(picture)
    image = middle_square(whole)
    height, width = whole.shape[2:]
    done = []
    if height != width:
        done.append(f"its middle {image.shape[2]} x {image.shape[3]} is used")
    if image.shape[-1] != side:
        done.append(f"resized to {side} x {side} (bicubic, antialiased)")
    if is_transparent(picture):
        done.append("transparency laid on white")
    return image, f"note: {path} is {width} x {height}: {', '.join(done)}" if done else None
