"""A progress bar and a wall-clock time for each stage of the pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm.auto import tqdm

Progress = bool | Callable[[str, Iterable, int | None], Iterable]
StepCallback = Callable[[str, int, Tensor], None]  # (stage, step, x0 [B, 3, S, S] in [0, 1])


class StageTimer:
    """Times the stages of one call and shows their progress.

    `with timer("prior", batches) as track:` writes the seconds of the block into `seconds["prior"]`;
    `track(iterable, total)` wraps the loop over the diffusion steps in it.

    Args:
        progress: False shows nothing. True draws one tqdm bar per stage on stderr, also for a stage that runs
            in several batches. A callable(stage, iterable, total) -> iterable wraps each loop itself.
        device: where the stages run; a GPU is synchronised before the clock is read.

    Raises:
        TypeError: `progress` is neither a bool nor a callable.

    Example:
        >>> timer = StageTimer(False, torch.device("cpu"))
        >>> with timer("prior") as track:
        ...     steps = list(track(range(3), 3))
        >>> steps, list(timer.seconds)
        ([0, 1, 2], ['prior'])
    """

    def __init__(self, progress: Progress, device: torch.device) -> None:
        if not isinstance(progress, bool) and not callable(progress):
            raise TypeError(f"progress: expected a bool or a callable, got {type(progress).__name__}")
        self.progress, self.device = progress, device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str, batches: int = 1) -> Iterator[Callable[..., Iterable]]:
        """Time a block as `stage`, which runs its loop `batches` times."""
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
        if self.device.type == "cuda":  # kernels still run when the call that launched them has returned
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
