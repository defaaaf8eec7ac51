"""Progress of a loop: nothing, a tqdm bar, or the caller's own wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Progress = Callable[..., Iterable] | bool | None


def with_progress(steps: Sequence, progress: Progress) -> Iterable:
    """`steps` themselves for None or False, in a tqdm bar for True, else progress(steps, total=...)."""
    if progress is None or progress is False:
        return steps
    if progress is True:
        from tqdm import tqdm

        progress = tqdm
    return progress(steps, total=len(steps))
