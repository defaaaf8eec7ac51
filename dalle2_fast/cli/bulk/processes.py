"""The processes of one command, which torchrun numbers: each takes its share, and none waits for another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dalle2_fast.pipeline.device import choose_device

if TYPE_CHECKING:
    import torch

Part = TypeVar("Part")


class Process(NamedTuple):
    """This process among those that torchrun has started.

    Args:
        rank: its number, 0 <= rank < count.
        count: the number of processes.
        local_rank: its number among those of this machine.

    Example:
        >>> Process(1, 3).share(["a", "b", "c", "d", "e"])
        ['b', 'e']
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> Process:
        """This process, from the variables that torchrun sets; the only one without them.

        Raises:
            ValueError: a variable is no whole number, or they do not fit each other.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        texts = {name: os.environ.get(name) for name in names}
        try:
            given = {name: int(text) for name, text in texts.items() if text is not None}
        except ValueError:
            given = {"RANK": -1}
        process = cls(given.get("RANK", 0), given.get("WORLD_SIZE", 1), given.get("LOCAL_RANK", 0))
        if not 0 <= process.rank < process.count or process.local_rank < 0:
            came = ", ".join(f"{name}={text}" for name, text in texts.items() if text is not None)
            raise ValueError(f"environment: expected RANK and WORLD_SIZE as torchrun sets them, got {came}")
        return process

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, parts: Sequence[Part]) -> list[Part]:
        """Every `count`-th part, beginning with number `rank`."""
        return list(parts[self.rank :: self.count])

    def device(self, name: str) -> torch.device:
        """The device that `--device name` stands for: of several processes, each has its GPU.

        Raises:
            ValueError: as `choose_device`; and if one GPU is named for several processes.
        """
        device = choose_device(name)
        if device.type != "cuda" or self.count == 1:
            return device
        if device.index is not None:
            raise ValueError(f"--device: expected auto, cuda or cpu with {self.count} processes, got {name}")
        return choose_device(f"cuda:{self.local_rank}")
