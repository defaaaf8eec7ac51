"""Batcher: one thread for the model; what waits with the same settings is drawn together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


class QueueFull(Exception):
    """There is no room for so many pictures."""


class Closed(Exception):
    """The batcher draws no more pictures."""


class Abandoned(Exception):
    """Nobody waits any longer for the pictures that are being drawn."""


@dataclass(eq=False)  # compared by identity
class Picture:
    """One picture that a request waits for.

    Args:
        settings: pictures of equal settings may share a batch.
        inputs: what it is made of, a caption for example.
        seed: of its random numbers.
    """

    settings: Hashable
    inputs: Any
    seed: int
    future: Future = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    abandoned: bool = False


class Batcher:
    """Draws pictures in batches, in the order in which they arrived.

    The thread takes the picture that has waited longest, waits until a batch of its settings is full or it
    has waited `max_wait`, and draws all of them. What fails in a batch is tried once more alone, so that
    one request cannot make another one fail.

    Args:
        draw: (settings, inputs, seeds, abandoned) -> results, one for each input; abandoned() becomes true
            when nobody waits for any of them.
        capacity: settings -> pictures of a batch.
        max_wait: seconds.
        max_queue: pictures that may wait.

    Example:
        >>> batcher = Batcher(lambda settings, inputs, seeds, abandoned: inputs, lambda settings: 2)
        >>> pictures = [Picture("settings", text, seed=0) for text in ("one", "two", "three")]
        >>> batcher.submit(pictures)
        >>> [picture.future.result() for picture in pictures]
        ['one', 'two', 'three']
        >>> batcher.close()
    """

    def __init__(
        self,
        draw: Callable[[Any, list[Any], list[int], Callable[[], bool]], Sequence[Any]],
        capacity: Callable[[Any], int],
        *,
        max_wait: float = 0.0,
        max_queue: int = 64,
    ) -> None:
        self._draw, self._capacity = draw, capacity
        self.max_wait, self.max_queue = max_wait, max_queue
        self._changed = threading.Condition()
        self._waiting: list[Picture] = []  # oldest first
        self._running: list[Picture] = []
        self._closed = False
        self._seconds = 0.0  # moving average per picture
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it draws pictures."""
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """Pictures that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Pictures that are being drawn."""
        return len(self._running)

    @property
    def retry_after(self) -> int:
        """Whole seconds, at least 1, in which what waits now is probably drawn."""
        return max(1, round(self._seconds * (self.waiting + self.running)))

    def submit(self, pictures: Sequence[Picture]) -> None:
        """Queue the pictures, all or none. QueueFull or Closed if that is impossible."""
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._waiting) + len(pictures) > self.max_queue:
                raise QueueFull
            self._waiting += pictures
            self._changed.notify()

    def cancel(self, pictures: Sequence[Picture]) -> None:
        """Drop those that wait. Those that are being drawn are finished together with others, or stopped."""
        with self._changed:
            for picture in pictures:
                picture.abandoned = True
            self._waiting = [picture for picture in self._waiting if not picture.abandoned]
            self._changed.notify()
        for picture in pictures:
            picture.future.cancel()

    def close(self, timeout: float = 5.0) -> None:
        """Fail everything with Closed, and wait at most `timeout` seconds for the thread."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            for picture in (*waiting, *self._running):
                picture.abandoned = True
            self._changed.notify()
        for picture in waiting:
            if picture.future.set_running_or_notify_cancel():
                picture.future.set_exception(Closed())
        self._thread.join(timeout)

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            began = time.monotonic()
            self._compute(batch)
            each = (time.monotonic() - began) / len(batch)
            self._seconds = each if self._seconds == 0 else 0.9 * self._seconds + 0.1 * each
            self._running = batch = []  # nothing here keeps the results alive

    def _next(self) -> list[Picture] | None:
        """The next batch, as soon as there is one; None after close()."""
        with self._changed:
            while not self._closed:
                if not self._waiting:
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                capacity = self._capacity(first.settings)
                batch = [picture for picture in self._waiting if picture.settings == first.settings]
                batch = batch[:capacity]
                rest = first.arrived + self.max_wait - time.monotonic()
                if len(batch) < capacity and rest > 0:
                    self._changed.wait(rest)
                    continue
                self._waiting = [picture for picture in self._waiting if picture not in batch]
                # A future that was cancelled in this very moment is not to be drawn.
                self._running = [each for each in batch if each.future.set_running_or_notify_cancel()]
                if self._running:
                    return self._running
            return None

    def _compute(self, batch: list[Picture]) -> None:
        def abandoned() -> bool:
            return all(picture.abandoned for picture in batch)

        try:
            inputs, seeds = [each.inputs for each in batch], [each.seed for each in batch]
            results = self._draw(batch[0].settings, inputs, seeds, abandoned)
            for picture, result in list(zip(batch, results, strict=True)):
                picture.future.set_result(result)
        except Exception as error:
            failure = error
            if abandoned():
                failure = Closed() if self._closed else Abandoned()
            elif len(batch) > 1:
                for picture in batch:
                    self._compute([picture])
                return
            for picture in batch:
                picture.future.set_exception(failure)
