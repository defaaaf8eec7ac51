"""Files that appear whole or not at all: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".partial"


@contextmanager
def atomic_write(path: str | os.PathLike, *, backup: str | os.PathLike | None = None) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; after the block the file written there becomes `path`.

    The file is flushed to the disk before it is renamed, so that a reader, and the next start after a power
    cut, sees the old file or the new one. The folder is flushed after it, so that the new one stays once the
    block has ended. If the block raises, the temporary file is deleted and `path` stays as it was.

    Args:
        path: the file to write; its folder must exist.
        backup: where an existing file at `path` is kept. None replaces it.

    Raises:
        OSError: the file cannot be written; the message names `path`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_write(folder / "report.json") as temporary:
        ...     _ = temporary.write_text("{}")
        >>> [file.name for file in folder.iterdir()]
        ['report.json']
    """
    path = Path(path)
    # The process number keeps two processes that write the same file from sharing a temporary one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(temporary, path)
        flush_names(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # else it has a message of its own
            raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
        raise


def flush_names(folder: Path) -> None:
    """Flush the names in a folder to the disk: until then a power cut may undo a rename.

    Windows opens no folders, and some network file systems flush none; there the rename is as durable as the
    system makes it.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
