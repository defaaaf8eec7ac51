"""Rows of the next steps, made by processes in the background while the device computes."""

from __future__ import annotations

import ctypes
import itertools
import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dalle2_fast.data.pairs import RowMaker, Rows

PART_BYTES = 8 << 20  # of the images that a process makes and sends together, so that batches may be large
PART_ROWS = 256

Span = tuple[int, int]  # first position, and the one after the last


def parts(begin: int, end: int, row_bytes: int) -> list[Span]:
    """A batch's positions in parts of at most PART_BYTES and PART_ROWS (at least one row).

    Example:
        >>> parts(0, 5, 4 << 20)
        [(0, 2), (2, 4), (4, 5)]
    """
    rows = max(1, min(PART_ROWS, PART_BYTES // max(1, row_bytes)))
    return [(first, min(first + rows, end)) for first in range(begin, end, rows)]


class Prefetcher:
    """Makes the rows of consecutive steps in `workers` processes.

    At most one batch and two parts for each process wait in memory. The processes end when the Prefetcher is
    closed or deleted, and with the process that started them, however that ends.

    Args:
        maker: of the rows.
        spans: step -> the parts of its batch; every batch has as many.
        workers: processes, at least 1.
        pin: put the rows into page-locked memory.
    """

    def __init__(
        self, maker: RowMaker, spans: Callable[[int], list[Span]], workers: int, pin: bool
    ) -> None:
        self._maker, self._spans, self._workers, self._pin = maker, spans, workers, pin
        self._parts: Iterator[Rows | Exception] | None = None
        self._step = 0

    def rows(self, step: int) -> list[Rows]:
        """The parts of a step's batch. Steps in order are made in advance; others begin anew.

        Raises:
            ValueError: as of `RowMaker.rows`.
            OSError: a process has ended.
        """
        if self._parts is None or step != self._step:
            self._start(step)
        count, found = len(self._spans(step)), []
        try:
            for part in itertools.islice(self._parts, count):
                if isinstance(part, Exception):
                    raise part
                found.append(part)
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
                raise OSError(
                    "data: a background process has ended, maybe for too little memory or a small /dev/shm: "
                    f"fewer --workers need less ({str(error).splitlines()[0]})"
                ) from error
            raise
        self._step = step + 1
        return found

    def close(self) -> None:
        """End the processes."""
        parts, self._parts = self._parts, None
        if parts is not None and hasattr(parts, "_shutdown_workers"):
            parts._shutdown_workers()  # what deleting it would do, but now

    def _start(self, step: int) -> None:
        self.close()
        waiting = math.ceil(len(self._spans(step)) / self._workers) + 1
        with warnings.catch_warnings():  # more workers than cores are the user's choice
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                _Parts(self._maker),
                sampler=_Consecutive(self._spans, step),
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=self._workers,
                prefetch_factor=max(2, waiting),
                pin_memory=self._pin,
                worker_init_fn=_prepare_worker,
                generator=torch.Generator(),  # otherwise it draws from the generator of the training's noise
            )
            self._parts, self._step = iter(loader), step


class _Parts(Dataset):
    """Span -> rows."""

    def __init__(self, maker: RowMaker) -> None:
        self._maker = maker

    def __getitem__(self, span: Span) -> Rows | Exception:
        try:
            return self._maker.rows(*span)
        except (ValueError, OSError, ImportError) as error:  # DataLoader would add a page of traceback
            return error


class _Consecutive(Sampler):
    """The spans of all steps from one on."""

    def __init__(self, spans: Callable[[int], list[Span]], step: int) -> None:
        self._spans, self._step = spans, step

    def __iter__(self) -> Iterator[Span]:
        for step in itertools.count(self._step):
            yield from self._spans(step)


def _unchanged(rows: Rows | Exception) -> Rows | Exception:
    return rows


def _prepare_worker(number: int) -> None:
    # Ctrl-C goes to all processes of a terminal; the one that trains decides, and may save its state first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # DataLoader looks every five seconds whether its parent lives. Until then a killed run's folder would
    # stay locked, because the lock belongs to the open file, which a fork shares.
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
