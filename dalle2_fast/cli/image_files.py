"""Image files of a command: those it is given, opened and made square, and those it writes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# What is written: the end of a file name -> Pillow's name of the format.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_SIDES = {"JPEG": 65_500, "WEBP": 16_383}  # pixels
EXIF_DESCRIPTION = 0x010E
MAX_COLUMNS = 8  # of a grid whose images have an order


def open_image(path: Path, argument: str) -> Image:
    """The image in a file, completely read and upright; errors name the argument and the file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    from dalle2_fast.data import image_formats

    try:
        image = image_formats.open_image(path)
        image.load()  # opening reads the header only
        return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{argument}: no such file: {path}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{argument}: {path} is a folder, expected an image") from None
    except UnidentifiedImageError:
        raise ValueError(f"{argument}: {path} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{argument}: {path} cannot be read ({error})") from None


def square_image(image: Image, path: Path, side: int) -> tuple[Tensor, str | None]:
    """The central square of an opened image, and a note that says how the image is changed, if it is.

    Args:
        image: as `open_image` gives it.
        path: its file, for the note.
        side: the size to which the pipeline will resize it.

    Returns:
        float32 [1, 3, S, S] in [0, 1], with transparency laid on white, and the note or None.
    """
    from dalle2_fast.data.images import central_square, from_pil, is_transparent

    whole = from_pil(image)
    square = central_square(whole)
    height, width = whole.shape[2:]
    changes = []
    if height != width:
        changes.append(f"its central {square.shape[2]} x {square.shape[3]} is used")
    if square.shape[-1] != side:
        changes.append(f"resized to {side} x {side} (bicubic, antialiased)")
    if is_transparent(image):
        changes.append("transparency laid on white")
    return square, f"note: {path} is {width} x {height}: {', '.join(changes)}" if changes else None


def check_format(path: Path, option: str) -> str:
    """Pillow's name of the format that a file name asks for; ValueError for one that is not written.

    Example:
        >>> check_format(Path("grid.jpg"), "--output")
        'JPEG'
    """
    if path.suffix.lower() not in FORMATS:
        expected = ", ".join(FORMATS)
        raise ValueError(f"{option}: expected a name that ends in {expected}, got {str(path)!r}")
    return FORMATS[path.suffix.lower()]


def check_sides(path: Path, width: int, height: int, option: str) -> None:
    """ValueError if the format of a file name does not hold an image of that size."""
    most = MAX_SIDES.get(check_format(path, option), max(width, height))
    if max(width, height) > most:
        raise ValueError(
            f"{option}: {path.suffix} holds up to {most} pixels a side, got {width} x {height}; expected .png"
        )


def save_image(image: Image, path: Path, texts: Mapping[str, object], quality: int = 90) -> None:
    """Write an image file, complete or not at all, in the format that its name asks for.

    Args:
        image: what to write.
        path: the file.
        texts: what to write into it: as text chunks of a PNG (Pillow: Image.open(path).text); as JSON in the
            EXIF field ImageDescription of a JPEG or WebP.
        quality: of a JPEG or WebP, 1 to 100.

    Raises:
        ValueError: another format, or one that does not hold so many pixels.
        OSError: the file cannot be written; the message names it.
    """
    from dalle2_fast.checkpoints.atomic import atomic_write

    kind = check_format(path, "--output")
    check_sides(path, *image.size, "--output")
    # iTXt, because a caption may hold any letter; a file name may even hold bytes that are no text.
    plain = {key: str(value).encode("utf-8", "backslashreplace").decode() for key, value in texts.items()}
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, value in plain.items():
            info.add_itxt(key, value)
        options: dict[str, object] = {"pnginfo": info}
    else:
        from PIL.Image import Exif

        exif = Exif()
        exif[EXIF_DESCRIPTION] = json.dumps(plain)  # ASCII, as EXIF wants it
        options = {"quality": quality, "exif": exif}
    with atomic_write(path) as temporary:
        image.save(temporary, format=kind, **options)


def free_path(path: Path) -> Path:
    """`path`, or its first sibling name-2, name-3, ... that does not exist.

    Example:
        >>> free_path(Path("no/such/folder/a-ring.png")).name
        'a-ring.png'
    """
    number, free = 2, path
    while free.exists():
        number, free = number + 1, path.with_stem(f"{path.stem}-{number}")
    return free


def check_writable(path: Path, option: str) -> None:
    """Raise if the file `path`, whose folder may not exist yet, could not be written. Leaves nothing behind.

    A file of that name is begun and removed, which is the only test of permissions, file systems and the
    length of names that is right everywhere.
    """
    from dalle2_fast.checkpoints.atomic import atomic_write

    folder = existing_folder(path.parent, option)
    try:
        with atomic_write(folder / path.name) as temporary:
            temporary.touch()
            raise _Abandon
    except _Abandon:
        if path.is_dir():
            raise IsADirectoryError(f"{option}: {path} is a folder, expected a file name") from None
    except OSError as error:
        if isinstance(error.__cause__, PermissionError):
            raise PermissionError(f"{option}: no permission to write in {folder}") from None
        raise OSError(f"{option}: {error}") from None


class _Abandon(Exception):
    """Ends an atomic_write that was only a test."""


def check_space(folder: Path, count: int, side: int, option: str) -> None:
    """Raise if `count` images of `side` x `side` pixels may not fit on the disk of `folder`."""
    needed = count * side**2 * 3  # bytes; a PNG file of noise is as large as its pixels
    free = shutil.disk_usage(existing_folder(folder, option)).free
    if free < needed:
        raise OSError(f"{option}: {free:,} bytes are free there, and {count} images may need {needed:,}")


def existing_folder(folder: Path, option: str) -> Path:
    """`folder`, or the nearest of its parents that exists; NotADirectoryError if that is no folder."""
    existing = folder
    while True:
        try:
            existing.stat()
            break
        except FileNotFoundError:
            existing = existing.parent
        except NotADirectoryError:
            raise NotADirectoryError(f"{option}: {existing.parent} is not a folder") from None
        except OSError as error:  # a name that is too long, a loop of links, ...
            raise OSError(f"{option}: {folder}: {error.strerror}") from None
    if not existing.is_dir():
        raise NotADirectoryError(f"{option}: {existing} is not a folder")
    return existing


def default_file_name(caption: str, seed: int) -> str:
    """A name that says what is in the file; another seed gives another name.

    Example:
        >>> default_file_name("A red ring!", 7)
        'a-red-ring-7.png'
    """
    words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60].rstrip("-")
    return f"{words or 'picture'}-{seed}.png"
