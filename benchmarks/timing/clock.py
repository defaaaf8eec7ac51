"""The clock: the time, memory and kernels of one call, and the ceilings of the device.

A time on a GPU is the median of replays of a CUDA graph. The graph runs the implementation on several sets of
inputs in turn, which together are larger than the L2 cache, so no call finds its inputs there. On a CPU it is
wall-clock time with a fixed number of threads.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases.registry import Case, Inputs
from benchmarks.timing.agreement import leaves_of, prepare

CACHES = 4  # the sets of inputs together exceed the L2 cache by this factor
GRAPH_SECONDS = 4e-3  # shortest replay: its launch (tens of us) is then less than 1 %


class NotTimed(Exception):
    """An implementation cannot be timed; the message says why."""


def timed_job(case: Case, function: Callable, inputs: dict, grad: Tensor | None) -> Callable[[], object]:
    """The work that is timed: the forward pass, the backward pass, or both."""
    if hasattr(function, "leaves"):
        leaves = function.leaves(inputs)
    else:
        leaves = [leaf for name in case.backward for leaf in leaves_of(inputs[name])]
    if not case.backward:
        return torch.no_grad()(lambda: function(**inputs))
    gradients = functools.partial(torch.autograd.grad, allow_unused=True)
    if case.with_forward:
        return lambda: gradients(function(**inputs), leaves, grad)
    output = function(**inputs)
    return lambda: gradients(output, leaves, grad, retain_graph=True)


def gpu_round(case: Case, function: Callable, inputs: Inputs) -> tuple[Callable[[], None], int]:
    """One round of the clock, which waits for the end of its work on the GPU, and its number of calls."""
    sets = [prepare(case, one) for one in input_sets(case, inputs)]
    stream = torch.cuda.Stream()  # one for both passes: backward runs on the stream of its forward pass
    with torch.cuda.stream(stream):
        jobs = [timed_job(case, function, *one) for one in sets]
        for job in jobs[:1] * 3 + jobs:
            job()
        stream.synchronize()
    if case.wall_clock:
        return lambda: ([jobs[0]() for _ in range(case.calls)], torch.cuda.synchronize()), case.calls
    repeats = 1
    while True:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(repeats):
                    for job in jobs:
                        job()
        except RuntimeError as error:
            raise NotTimed(f"cannot be captured in a CUDA graph: {error}") from error
        graph.replay()
        torch.cuda.synchronize()
        seconds = _gpu_seconds(graph.replay)
        if seconds >= GRAPH_SECONDS:
            return functools.partial(_replay, graph, jobs), repeats * len(jobs)
        repeats *= max(2, int(1.2 * GRAPH_SECONDS / max(seconds, 1e-6)))


def input_sets(case: Case, first: Inputs) -> list[Inputs]:
    """`first` and copies of it. Networks are not copied, because their weights exceed the cache anyway."""
    tensors = [value for value in first.values() if isinstance(value, Tensor)]
    size = sum(value.numel() * value.element_size() for value in tensors)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    networks = any(isinstance(value, nn.Module) for value in first.values())
    copies = 1 if case.wall_clock or networks else max(2, -(-CACHES * cache // size))
    clones = ({key: value.clone() if isinstance(value, Tensor) else value for key, value in first.items()}
              for _ in range(copies - 1))  # fmt: skip
    return [first, *clones]


def _replay(graph: torch.cuda.CUDAGraph, _jobs: list[Callable]) -> None:
    """_jobs keep the tensors alive that the graph reads; otherwise the next capture reuses their memory."""
    graph.replay()
    torch.cuda.synchronize()


def cpu_round(case: Case, function: Callable, inputs: Inputs) -> tuple[Callable[[], None], int]:
    """As `gpu_round`, on a CPU: one call."""
    job = timed_job(case, function, *prepare(case, inputs))
    job()
    return job, 1


def peak_bytes(case: Case, function: Callable, inputs: Inputs) -> int | None:
    """GPU memory that one call needs beyond its inputs, results included. None on a CPU, where measuring it
    takes a separate process: benchmarks/jobs/contrastive_memory.py."""
    if case.device != "cuda":
        return None
    job = timed_job(case, function, *prepare(case, inputs))
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernel_count(case: Case, function: Callable, inputs: Inputs) -> int | None:
    """Kernels that one call launches on a GPU; None if the case has no goal for them."""
    if case.target_launches is None or case.device != "cuda":
        return None
    job = timed_job(case, function, *prepare(case, inputs))
    job()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len([name for name in on_gpu if not name.startswith(("Memcpy", "Memset"))])


def ceilings(device: str) -> dict[str, float]:
    """The best of this device, measured in this run: bytes per second (read and written) of torch's copy,
    FLOPs per second of torch's matrix product (bfloat16 on a GPU, float32 on a CPU)."""
    on_gpu = device == "cuda"
    size, side = (2**29, 8192) if on_gpu else (2**26, 1024)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    c = torch.empty_like(a)
    seconds = _gpu_seconds if on_gpu else _cpu_seconds
    return {
        "bytes_per_second": 2 * size / _median(seconds, lambda: target.copy_(source)),
        "flops_per_second": 2 * side**3 / _median(seconds, lambda: torch.mm(a, a, out=c)),
    }


def _median(seconds: Callable[[Callable], float], job: Callable, rounds: int = 20) -> float:
    return sorted(seconds(job) for _ in range(rounds))[rounds // 2]


def _gpu_seconds(job: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    job()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def _cpu_seconds(job: Callable) -> float:
    before = time.perf_counter()
    job()
    return time.perf_counter() - before
