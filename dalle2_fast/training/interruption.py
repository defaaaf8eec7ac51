"""SIGINT and SIGTERM as requests to stop at the next step, with the state saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield a list that receives the number of a SIGINT or SIGTERM; a second one ends the process as usual.

    Outside the main thread, where Python sets no signal handlers, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number, frame):
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()
