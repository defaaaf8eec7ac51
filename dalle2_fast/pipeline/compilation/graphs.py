"""DALLE2.capture, and the argument `graphs` of the methods that sample: steps replayed as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from dalle2_fast.cuda_graphs import CudaGraphs
from dalle2_fast.diffusion.graphs.cache import SamplingGraphs

if TYPE_CHECKING:
    from dalle2_fast.pipeline.dalle2 import DALLE2

# Not attributes of the pipelines, because graphs can be neither copied nor pickled.
_GRAPHS: WeakKeyDictionary[DALLE2, SamplingGraphs] = WeakKeyDictionary()


@dataclass(frozen=True)
class CaptureReport:
    """What `DALLE2.capture` did.

    Args:
        stages: stage -> "captured", "replayed" (its graph exists), or why it runs without graphs.
        captured: graphs that were captured now.
        kept: graphs that the pipeline has.
        seconds: wall-clock seconds.

    Example:
        >>> print(CaptureReport({"prior": "captured", "decoder": "replayed"}, 1, 2, 0.5))
        prior: captured
        decoder: replayed
        1 graph(s) captured in 0.50 s, 2 kept
    """

    stages: Mapping[str, str]
    captured: int
    kept: int
    seconds: float

    def __str__(self) -> str:
        lines = [f"{stage}: {outcome}" for stage, outcome in self.stages.items()]
        summary = f"{self.captured} graph(s) captured in {self.seconds:.2f} s, {self.kept} kept"
        return "\n".join([*lines, summary])


def check_graphs(graphs: bool | str, device: torch.device, argument: str = "graphs") -> bool:
    """Whether steps are to be replayed as CUDA graphs on a device.

    Args:
        graphs: True, False, or "auto", which is True where there are CUDA graphs.
        device: of the weights.
        argument: what an error message calls it.

    Raises:
        TypeError: `graphs` is neither a bool nor a string.
        ValueError: another string, or True where there are no CUDA graphs.

    Example:
        >>> check_graphs("auto", torch.device("cpu"))
        False
    """
    if not isinstance(graphs, (bool, str)):
        raise TypeError(f"{argument}: expected True, False or 'auto', got {graphs!r}")
    if isinstance(graphs, str) and graphs != "auto":
        raise ValueError(f"{argument}: expected True, False or 'auto', got {graphs!r}")
    reason = None if graphs is False else CudaGraphs.why_unavailable(device)
    if graphs is True and reason is not None:
        raise ValueError(f"{argument}: expected False or 'auto' here, because {reason}")
    return graphs is not False and reason is None


def graphs_of(pipe: DALLE2, graphs: bool | str) -> SamplingGraphs | None:
    """The graphs of a pipeline where they are wanted; None where it samples without. See `check_graphs`."""
    if pipe._offload_device is not None:  # a network that moves has other addresses than its graph
        if graphs is True:
            raise ValueError("graphs: expected False or 'auto' with enable_model_cpu_offload, got True")
        return None
    if not check_graphs(graphs, pipe.device):
        return None
    cache = _GRAPHS.get(pipe)
    if cache is None or cache.graphs.device != pipe.device:
        _GRAPHS[pipe] = cache = SamplingGraphs(CudaGraphs(pipe.device))
    return cache


def capture(
    pipe: DALLE2, prompt: str | Sequence[str] | None = None, num_images: int = 4, **options: Any
) -> CaptureReport:
    """Capture the steps of every stage as CUDA graphs ahead of time, by one call of `generate`.

    A graph serves calls of the same stage, number of images, size, dtype, sampler and other constants, with
    and without guidance: other captions, seeds, steps and weights of guidance need no other graph. A call
    with other shapes captures its own, as does a call after weights were replaced; weights that are written
    in place, as load_state_dict does, are seen. A pipeline keeps at most 32 graphs; the least recently used
    are dropped.

    Args:
        prompt: as in `generate`; only the number of captions counts. None is one caption.
        num_images: as in `generate`.
        options: the other arguments of `generate`.

    Returns:
        What was captured, and why a stage runs without graphs.

    Raises:
        ValueError: the weights are on a device without CUDA graphs; and as `generate` does.
        RuntimeError: a step cannot be captured; the message names its sizes. Without graphs, the pipeline
            works as before.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> pipe = DALLE2.from_pretrained()
        >>> if pipe.device.type == "cuda":
        ...     print(pipe.capture(num_images=4))  # later calls of generate with 4 images replay the graphs
    """
    cache = graphs_of(pipe, True)
    if prompt is None:
        prompt = getattr(pipe.tokenizer, "words", ("a",))[0]
    begin, before = time.perf_counter(), cache.captured
    options = {"seed": 0} | options | {"graphs": True}
    stages = pipe.generate(prompt, num_images, **options).graphs
    return CaptureReport(stages, cache.captured - before, len(cache), time.perf_counter() - begin)


def release_graphs(pipe: DALLE2) -> DALLE2:
    """Drop the CUDA graphs of the pipeline and return their memory to the device.

    Returns:
        The same pipeline.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> pipe = DALLE2.from_pretrained().release_graphs()
    """
    cache = _GRAPHS.pop(pipe, None)
    if cache is not None:
        cache.clear()
    return pipe
