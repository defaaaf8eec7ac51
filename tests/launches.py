"""What would be launched: the ops' launchers run on the CPU, at any size, and their kernels do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock


class Launch(NamedTuple):
    kernel: Any  # as the interpreter wraps it
    args: tuple
    kwargs: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch of an interpreted kernel is appended to the list instead of being run."""
    from triton.runtime.interpreter import InterpretedFunction

    found: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        found.append(Launch(self, args, kwargs))

    with mock.patch.object(InterpretedFunction, "run", run):
        yield found
