"""Progress of a loop: none, a tqdm bar, or the caller's wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Progress = Callable[..., Iterable] | bool | None


def with_progress(steps: Sequence, progress: Progress) -> Iterable:
    """Wrap the steps of a loop.

    Args:
        steps: what the loop iterates over.
        progress: None or False for no progress, True for a tqdm bar, or a function that is called as
            progress(steps, total=...) and returns an iterable of the same steps.

    Returns:
        An iterable of `steps`.

    Example:
        >>> list(with_progress(range(3), None))
        [0, 1, 2]
    """
    if progress is None or progress is False:
        return steps
    if progress is True:
        from tqdm import tqdm

        progress = tqdm
    return progress(steps, total=len(steps))
