"""Sums of losses and gradient norms between two lines of the log."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor


class Window:
    """The steps since the last log line.

    The sums stay on the device, because reading one value per step would stall a GPU.

    Args:
        device: where losses and norms are.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.steps = 0
        self.rate = 0.0  # learning rate of the last step
        self.begin = time.monotonic()

    def start(self) -> None:
        """Let the clock of an empty window run from now on."""
        if self.steps == 0:
            self.begin = time.monotonic()

    def add(self, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Add one step: its loss and gradient norm, float32 scalars, and its learning rate."""
        self.loss += loss
        self.norm += norm
        self.steps += 1
        self.rate = rate

    def is_finite(self) -> bool:
        """False if any loss or gradient norm was not finite: infinities and NaN stay in a sum."""
        return math.isfinite((self.loss + self.norm).item())

    def state_dict(self) -> dict:
        """The sums, and the seconds that they took, for a run that is stopped between two lines."""
        seconds = time.monotonic() - self.begin
        return {
            "loss": self.loss, "norm": self.norm, "steps": self.steps, "rate": self.rate, "seconds": seconds
        }  # fmt: skip

    def load_state_dict(self, saved: dict) -> None:
        """Continue the sums of `state_dict`."""
        self.loss.copy_(saved["loss"])
        self.norm.copy_(saved["norm"])
        self.steps, self.rate = int(saved["steps"]), float(saved["rate"])
        self.begin = time.monotonic() - float(saved["seconds"])

    def summary(self, batch_size: int) -> dict[str, float]:
        """The columns of a log line: images per second, mean loss and gradient norm, learning rate."""
        seconds = time.monotonic() - self.begin
        return {
            "images_per_s": round(self.steps * batch_size / seconds, 2),
            "loss": self.loss.item() / self.steps,
            "grad_norm": self.norm.item() / self.steps,
            "lr": self.rate,
        }


def used_memory(device: torch.device) -> dict[str, float]:
    """The column memory_gb of a log line: the most that torch has allocated on a GPU; nothing on a CPU.

    Example:
        >>> used_memory(torch.device("cpu"))
        {}
    """
    if device.type != "cuda":
        return {}
    return {"memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)}
