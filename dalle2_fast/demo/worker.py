"""Worker: one thread draws, job after job, and each job tells its page how far it is."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Stopped(Exception):
    """Ends a job whose page has stopped it."""


@dataclass(frozen=True)
class State:
    """How far a job is.

    Args:
        waiting: jobs that are drawn before it.
        stage: the stage that runs; None before the first one.
        step: finished steps of the stage.
        steps: all steps of the stage.
        images: float32 [B, 3, S, S] in [0, 1] on the CPU, what they would be if this step were the last.
    """

    waiting: int = 0
    stage: str | None = None
    step: int = 0
    steps: int = 0
    images: Tensor | None = None


class Job:
    """One call of the pipeline, whose arguments `progress` and `callback` are the methods of these names.

    Args:
        draw: is called with the job, in the thread of the worker; its result is `result()`.

    Example:
        >>> job = Worker().start(lambda job: list(job.progress("decoder", range(2), 2)))
        >>> [state.stage for state in job.states()][-1], job.result()
        ('decoder', [0, 1])
    """

    def __init__(self, draw: Callable[[Job], Any]) -> None:
        self._draw = draw
        self._states: queue.SimpleQueue[State | None] = queue.SimpleQueue()
        self._state = State()
        self._stop = threading.Event()
        self._future: Future | None = None

    def progress(self, stage: str, steps: Iterable, total: int | None = None) -> Iterator:
        """Wrap the loop of a stage; Stopped before the first step after `stop`."""
        count = 0
        for step in steps:
            self._report(replace(self._state, stage=stage, step=count, steps=total or 0))
            yield step
            count += 1
        self._report(replace(self._state, stage=stage, step=count, steps=total or count))

    def callback(self, stage: str, step: int, x0: Tensor) -> None:
        """Show x0 of a step."""
        self._report(replace(self._state, images=x0.float().cpu()))

    def _report(self, state: State) -> None:
        if self._stop.is_set():
            raise Stopped
        self._state = state
        self._states.put(state)

    def stop(self) -> None:
        """End the job at its next step, or before it begins."""
        self._stop.set()
        if self._future is not None:
            self._future.cancel()

    def states(self, every: float = 0.5) -> Iterator[State]:
        """Its state whenever that changes, until the job ends; of several changes only the last.

        Args:
            every: seconds after which the number of jobs before it is looked at again.
        """
        waiting = None
        while True:
            try:
                state = last = self._states.get(timeout=every)
                while state is not None and not self._states.empty():
                    last, state = state, self._states.get()
                if last is not None:
                    yield state or last
                if state is None:
                    return
            except queue.Empty:
                if self._state.stage is None and waiting != (ahead := self._ahead()):
                    waiting = ahead
                    yield State(waiting=ahead)

    def result(self) -> Any:
        """What `draw` returned; Stopped, or what it raised."""
        try:
            return self._future.result()
        except CancelledError:
            raise Stopped from None

    _ahead: Callable[[], int] = staticmethod(lambda: 0)


class Worker:
    """Draws the jobs of all pages in one thread, in the order in which they were started.

    One thread, because the networks share one device, and because each new thread would start OpenMP's anew.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._open: list[Job] = []
        self._lock = threading.Lock()

    def start(self, draw: Callable[[Job], Any]) -> Job:
        """Draw as soon as the jobs before it have ended."""
        job = Job(draw)
        job._ahead = lambda: self._before(job)
        with self._lock:
            self._open.append(job)
            job._future = self._pool.submit(self._run, job)
        job._future.add_done_callback(lambda _: self._end(job))
        return job

    def stop(self) -> None:
        """Stop all jobs."""
        with self._lock:
            jobs = list(self._open)
        for job in jobs:
            job.stop()

    def _run(self, job: Job) -> Any:
        if job._stop.is_set():
            raise Stopped
        return job._draw(job)

    def _before(self, job: Job) -> int:
        with self._lock:
            return self._open.index(job) if job in self._open else 0

    def _end(self, job: Job) -> None:
        with self._lock:
            self._open.remove(job)
        job._states.put(None)
