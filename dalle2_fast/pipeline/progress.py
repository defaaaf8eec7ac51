"""A progress bar and a clock for each stage of the chain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm


class StageWatch:
    """`with watch("prior", batches) as track:` times the block into `seconds["prior"]`, and
    `track(iterable, total)` wraps the loop over the diffusion steps inside it.

    progress: False = silent; True = one tqdm bar per stage on stderr, also for a stage that runs in several
    batches; a callable(stage, iterable, total) -> iterable wraps each loop itself.
    """

    def __init__(self, progress: bool | Callable, device: torch.device) -> None:
        if not isinstance(progress, bool) and not callable(progress):
            raise TypeError(f"progress: expected a bool or a callable, got {type(progress).__name__}")
        self.progress, self.device = progress, device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str, batches: int = 1) -> Iterator[Callable]:
        bar = tqdm(desc=f"{stage:>9}", unit="step") if self.progress is True else None

        def track(iterable: Iterable, total: int | None = None) -> Iterable:
            if callable(self.progress):
                yield from self.progress(stage, iterable, total)
                return
            if bar is not None and bar.total is None and total is not None:
                bar.total = total * batches
                bar.refresh()
            for item in iterable:
                yield item
                if bar is not None:
                    bar.update()

        begin = self._now()
        try:
            yield track
            self.seconds[stage] = self._now() - begin
        finally:
            if bar is not None:
                bar.close()

    def _now(self) -> float:
        if self.device.type == "cuda":  # kernels run on after the call has returned
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
