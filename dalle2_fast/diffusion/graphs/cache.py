"""Captured sampling steps: one set for each shape, of which the least recently used are dropped."""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from dalle2_fast.diffusion.graphs.plan import ConditionedNet, SamplingPlan
from dalle2_fast.diffusion.graphs.static import StaticSteps
from dalle2_fast.diffusion.progress import Progress, with_progress


class Graphs(Protocol):
    """What captures functions, see `dalle2_fast.cuda_graphs.CudaGraphs`."""

    def warm_up(self, function: Callable[[], None]) -> None: ...

    def capture(self, function: Callable[[], None]) -> Callable[[], None]: ...

    def marker(self) -> Callable[[], bool]: ...

    def release(self) -> None: ...


@dataclass
class _Entry:
    static: StaticSteps
    replays: list[Callable[[], None]]
    weights: tuple


class SamplingGraphs:
    """Runs sampling plans by replaying captured steps; the steps of a plan are captured when it is new.

    Args:
        graphs: captures functions of one device.
        limit: the largest number of graphs that are kept; the least recently used are dropped.

    Attributes:
        captured: how many graphs were captured so far.
    """

    def __init__(self, graphs: Graphs, limit: int = 32) -> None:
        self.graphs, self.limit, self.captured = graphs, limit, 0
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._failures: dict[tuple, str] = {}
        self._lock = threading.Lock()  # a second thread would write into the buffers of a run

    def __len__(self) -> int:
        """The number of graphs that are kept."""
        return sum(len(entry.replays) for entry in self._entries.values())

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._entries.clear()
        self._failures.clear()
        self.graphs.release()

    def run(
        self, plan: SamplingPlan, progress: Progress = None, *, retry: bool = False
    ) -> tuple[Tensor, str]:
        """Make all steps of a plan.

        Args:
            plan: its networks are ConditionedNets.
            progress: see `GaussianDiffusion.sample`; it follows the steps as the device finishes them.
            retry: capture also what failed before.

        Returns:
            x0 [B, C, *], and what was done: "replayed", "captured", or why the steps were captured again.

        Raises:
            CaptureError: the steps cannot be captured; the device is as before.
        """
        with self._lock:
            entry, outcome = self._entry(plan, retry)
            entry.static.begin(plan)
            markers = []
            for position in plan.choice[plan.start :]:
                entry.replays[position]()
                if progress:
                    markers.append(self.graphs.marker())
            result = entry.static.x.clone()
        for _ in with_progress(_Finished(markers), progress):
            pass
        return result, outcome

    def _entry(self, plan: SamplingPlan, retry: bool) -> tuple[_Entry, str]:
        key, weights, outcome = StaticSteps.key(plan), weights_of(plan.modules()), "captured"
        if key in self._failures and not retry:
            raise CaptureError(self._failures[key])
        entry = self._entries.get(key)
        if entry is not None and entry.weights == weights:
            self._entries.move_to_end(key)
            return entry, "replayed"
        if entry is not None:
            del self._entries[key]
            outcome = "captured again, because weights were replaced"
        try:
            static = StaticSteps(plan)
            replays = []
            for step in static.steps:
                static.begin(plan)  # so that the steps of the warm-up are steps of a real run
                self.graphs.warm_up(step)
                replays.append(self.graphs.capture(step))
        except RuntimeError as error:
            reason, is_memory_short = _reason(plan, error, len(self))
        else:
            reason = None
        if reason is not None:  # here the error no longer holds the network's tensors
            static = replays = None
            self._failures[key] = reason
            if is_memory_short:
                self._entries.clear()
                self.graphs.release()
            raise CaptureError(reason)
        self._failures.pop(key, None)
        self.captured += len(replays)
        self._entries[key] = entry = _Entry(static, replays, weights)
        while len(self) > self.limit and len(self._entries) > 1:
            self._entries.popitem(last=False)
        return entry, outcome


class CaptureError(RuntimeError):
    """Steps that cannot be captured as a CUDA graph; the message says why and names the sizes."""


@dataclass
class StageGraphs:
    """What one stage of a call asks of SamplingGraphs, as the argument `graphs` of `sample`.

    Args:
        cache: the graphs.
        stage: the name of the stage, for messages.
        required: whether steps that cannot be captured for want of memory are an error. Otherwise, they run
            without a graph, with a warning.
    """

    cache: SamplingGraphs
    stage: str
    required: bool = False
    outcomes: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """What was done with the batches of the stage, the same only once."""
        return "; ".join(dict.fromkeys(self.outcomes)) or "without graphs: the stage is no diffusion"

    def run(
        self, plan: SamplingPlan, progress: Progress, *, resampled: bool, has_callback: bool
    ) -> Tensor | None:
        """x0 of the plan, or None where its steps have to run without a graph; `outcome` says why."""
        if reason := why_not_captured(plan, resampled, has_callback):
            self.without(reason)
            return None
        try:
            result, outcome = self.cache.run(plan, progress, retry=self.required)
        except CaptureError as error:
            if self.required:
                raise CaptureError(f"{self.stage}: {error}") from error
            self.without(str(error))
            warnings.warn(f"{self.stage}: without graphs: {error}", RuntimeWarning, stacklevel=2)
            return None
        self.outcomes.append(outcome)
        return result

    def without(self, reason: str) -> None:
        """Write down why the steps run without a graph."""
        self.outcomes.append(f"without graphs: {reason}")


def why_not_captured(plan: SamplingPlan, resampled: bool, has_callback: bool) -> str | None:
    """Why the steps of a plan cannot be captured; None if they can."""
    if has_callback:
        return "a callback sees the state of every step"
    if resampled:
        return "inpainting with resampling goes back and forth between the steps"
    if not all(isinstance(net, ConditionedNet) for net, _ in plan.nets):
        return "a network is a plain function, as for an image that is made in tiles"
    if not plan.x.numel():
        return "there is nothing to sample"
    if torch.is_autocast_enabled(plan.x.device.type):
        return "autocast is enabled"
    for module in plan.modules():
        if {"forward", "denoise"} & vars(module).keys():
            return "a network runs as a compiled program"
        if any(child._forward_hooks or child._forward_pre_hooks for child in module.modules()):
            return "a network has forward hooks"
    return None


def weights_of(modules: Iterator[nn.Module]) -> tuple:
    """Changes when a weight is replaced by another tensor, not when it is written to."""
    return tuple(
        (tensor.data_ptr(), tensor.dtype, tensor.stride())
        for module in modules
        for tensors in (module.parameters(), module.buffers())
        for tensor in tensors
    )


def _reason(plan: SamplingPlan, error: BaseException, kept: int) -> tuple[str, bool]:
    """Why capturing failed, and whether for want of memory: an error at its end may hide the first one."""
    chain = error
    while chain is not None and not isinstance(chain, torch.OutOfMemoryError):
        chain = chain.__context__
    what = f"the step of {plan.describe()}"
    if chain is not None:
        return (
            f"the device has too little memory to capture {what} ({kept} graph(s) were kept, and are dropped "
            "now); sample fewer at a time (batch_size), or without graphs"
        ), True
    return f"cannot capture {what}: {' '.join(str(error).split())}", False


class _Finished:
    """Iterates over the steps as the device finishes them, without keeping it waiting."""

    def __init__(self, markers: list[Callable[[], bool]]) -> None:
        self.markers = markers

    def __len__(self) -> int:
        return len(self.markers)

    def __iter__(self) -> Iterator[int]:
        for step, is_finished in enumerate(self.markers):
            while not is_finished():
                time.sleep(0.001)
            yield step
