"""One command at a time writes into the folder of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import reason

FILE = ".lock"
BYTE = 2**30  # that Windows locks; the process number, before it, stays readable


@contextmanager
def run_lock(out: str | os.PathLike) -> Iterator[None]:
    """Within the block no other command, and no other thread, trains in the folder `out`.

    The operating system holds the lock for the open file and releases it when the process ends, also by
    SIGKILL: a file that is left behind locks nothing. If the block leaves a folder that did not exist before
    empty, the folder is deleted.

    Args:
        out: folder of the run; it is made if it does not exist.

    Raises:
        TrainingError: another command trains there, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> out = tempfile.mkdtemp()
        >>> with run_lock(out):
        ...     os.listdir(out)
        ['.lock']
    """
    out = Path(out)
    absent = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(out)
    except OSError as error:
        raise TrainingError(f"--out: cannot write to {out}: {reason(error)}") from error
    try:
        yield
    finally:
        _release(out / FILE, descriptor)
        for folder in absent:
            try:
                folder.rmdir()
            except OSError:  # it holds the run
                break


def _acquire(out: Path) -> int:
    path = out / FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try_lock(descriptor):
                holder = os.read(descriptor, 40).decode(errors="replace")
                raise TrainingError(
                    f"--out: another command{f' (process {holder})' if holder else ''} is training in {out}; "
                    "wait for its end or choose another folder"
                )
            # A command that ends deletes the file: the file that was opened may no longer be at this path.
            if _is_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

    def _release(path: Path, descriptor: int) -> None:
        os.close(descriptor)  # an open file cannot be deleted; the file stays and locks nothing

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _release(path: Path, descriptor: int) -> None:
        path.unlink(missing_ok=True)  # while it is locked, so that nobody else holds this file
        os.close(descriptor)
