"""PNG files: a grid of pictures with the caption and the seed inside, written beside and renamed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 4  # white pixels between the pictures of a grid
WIDEST = 8  # pictures beside each other where their order means something
LINE = 14  # pixels of a line of text under a picture


def grid(
    pictures: Sequence[Image], *, labels: Sequence[str] | None = None, columns: int | None = None
) -> Image:
    """Equal pictures -> one, white between them: so many columns, or as square a grid as they fill.

    labels: a line of text under each.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    if labels is not None:  # a line that is wider than its picture moves the next one on
        width = max(width, *(math.ceil(ImageFont.load_default().getlength(text)) + 4 for text in labels))
    line = LINE if labels is not None else 0
    size = (columns * (width + GAP) - GAP, rows * (height + line + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for index, picture in enumerate(pictures):
        left, top = index % columns * (width + GAP), index // columns * (height + line + GAP)
        sheet.paste(picture, (left, top))
        if labels is not None:
            ImageDraw.Draw(sheet).text((left + 2, top + height), labels[index], fill="black")
    return sheet


def save_png(picture: Image, path: Path, texts: dict[str, object]) -> None:
    """Write `picture` with `texts` as PNG text chunks (Pillow: Image.open(path).text). Raises OSError."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, str(value))  # iTXt, as a caption may hold any letter
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        picture.save(beside, format="PNG", pnginfo=info)
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
        raise


def check_writable(folder: Path, option: str) -> None:
    """Raise now, before half a minute of work, if a file in `folder` could not be written. Makes nothing."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{option}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{option}: no permission to write in {place}")


def file_name(caption: str, seed: int) -> str:
    """A default name that says what is in the file, and is another one for another seed."""
    words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60].rstrip("-")
    return f"{words or 'picture'}-{seed}.png"
