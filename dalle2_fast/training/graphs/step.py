"""A training step that is captured as a CUDA graph after its first calls, and then replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dalle2_fast.training.errors import TrainingError

WARM_UPS = 3  # steps of the run like all others; in the first one the optimisers create their state


class Graphs(Protocol):
    """What captures functions, see `dalle2_fast.cuda_graphs.CudaGraphs`."""

    def warm_up(self, function: Callable[[], None], times: int = ...) -> None: ...

    def capture(
        self, function: Callable[[], None], generators: list[torch.Generator] = ...
    ) -> Callable[[], None]: ...


class GraphedStep:
    """Calls a step on a copy of each batch that keeps its address: directly at first, then as a graph.

    Args:
        step: called as step(batch), returns the loss and the norm of the gradient. It does everything that a
            step does on the device. What changes from step to step it reads from tensors that stay.
        graphs: captures it.
        generator: of the random numbers of the step; the caller seeds it before every call.
    """

    def __init__(
        self, step: Callable[[Any], tuple[Tensor, Tensor]], graphs: Graphs, generator: torch.Generator
    ) -> None:
        self.step, self.graphs, self.generator = step, graphs, generator
        self.batch: Any = None
        self.loss = torch.zeros((), device=generator.device)
        self.norm = torch.zeros((), device=generator.device)
        self.calls = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Make a step with a batch, of which the step gets the tensors alone.

        Returns:
            The loss and the norm, in tensors that the next call overwrites.

        Raises:
            TrainingError: the batch has other shapes than the first one, or the step cannot be captured.
        """
        self._take(batch)
        if self.replay is None and self.calls == WARM_UPS:
            try:
                self.replay = self.graphs.capture(self._run, [self.generator])
            except RuntimeError as error:
                sizes = ", ".join(str(list(tensor.shape)) for tensor in self._tensors(self.batch))
                reason = " ".join(str(error).split())
                raise TrainingError(
                    f"--graphs: cannot capture the step of a batch of {sizes}: {reason}; train without"
                ) from error
        if self.replay is None:
            self.graphs.warm_up(self._run, 1)
        else:
            self.replay()
        self.calls += 1
        return self.loss, self.norm

    def _run(self) -> None:
        loss, norm = self.step(self.batch)
        self.loss.copy_(loss)
        self.norm.copy_(norm)

    def _take(self, batch: dict) -> None:
        if self.batch is None:
            self.batch = pytree.tree_map(
                lambda leaf: torch.empty_like(leaf) if isinstance(leaf, Tensor) else None, batch
            )
        buffers, tensors = self._tensors(self.batch), self._tensors(batch)
        expected, got = ([tuple(x.shape) for x in some] for some in (buffers, tensors))
        if expected != got:
            raise TrainingError(
                f"--graphs: expected batches of one shape, {expected}, got {got}; train without"
            )
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)

    @staticmethod
    def _tensors(batch: Any) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
