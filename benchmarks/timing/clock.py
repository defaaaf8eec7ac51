"""First right, then fast: the check of an implementation of a case, its time and its peak memory.

A time on a GPU is the median of replays of a CUDA graph that runs the implementation on several sets of
inputs in turn, together larger than the L2 cache, so that no call finds its inputs there. On a CPU it is wall
clock with a fixed number of threads.
"""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases.registry import Case, Inputs
from tests.support.truth import assert_close_to_truth

CACHES = 4  # the sets of inputs together exceed the L2 cache by this factor
GRAPH_SECONDS = 4e-3  # a replay lasts at least this long: launching it (tens of us) is then under 1 %
RIVAL_ERROR = 0.05  # a rival has to compute the same formula, not to be as accurate


class NotTimed(Exception):
    """Why there is no time."""


def results_of(case: Case, function: Callable, inputs: Inputs) -> dict[str, Tensor]:
    """{"output 0": ..., "d x": ...}: what the case computes. A network's gradient is one long vector."""
    inputs, grad = prepare(case, inputs)
    foreign = hasattr(function, "leaves")  # it has parameters of its own, whose order is its own, too
    with torch.set_grad_enabled(bool(case.backward)):
        outputs = function(**inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    owned = [] if foreign else [leaves_of(inputs[name]) for name in case.backward]
    if owned:
        leaves = [leaf for some in owned for leaf in some]
        found = iter(torch.autograd.grad(outputs[0], leaves, grad, allow_unused=True))
        for name, some in zip(case.backward, owned, strict=True):
            parts = [part for part in (next(found) for _ in some) if part is not None]
            whole = isinstance(inputs[name], nn.Module)
            results[f"d {name}"] = torch.cat([part.flatten() for part in parts]) if whole else parts[0]
    return results


def prepare(case: Case, inputs: Inputs) -> tuple[dict, Tensor | None]:
    inputs = dict(inputs)
    grad = inputs.pop("grad", None)
    for name in case.backward:
        if isinstance(inputs[name], Tensor):
            inputs[name] = inputs[name].detach().requires_grad_()
    return inputs, grad


def leaves_of(value: Tensor | nn.Module) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value.parameters())


def ours(case: Case, impl: str) -> Callable:
    return lambda **inputs: case.ours(impl, **inputs)


def check(case: Case, name: str, function: Callable, inputs: Inputs) -> None:
    """Raises AssertionError where an implementation disagrees with the reference in float64, or where ours
    does not give the same bits twice."""
    if hasattr(function, "ready"):
        function.ready(inputs)  # before the truth: from here on both have the same weights
    wide = {key: widened(value) for key, value in inputs.items()}
    actual = results_of(case, function, inputs)
    if name in case.own_weights:
        expected = results_of(case, ours(case, "reference"), inputs)
        for key, value in expected.items():
            if not key.startswith("output"):
                continue
            assert actual[key].numel() == value.numel(), f"{name}: {key} has another size"
            assert bool(actual[key].isfinite().all()), f"{name}: {key} is not finite"
        return
    truth = results_of(case, ours(case, "reference"), wide)
    plain = results_of(case, ours(case, "reference"), inputs)
    if name.startswith("ours"):
        assert_close_to_truth(actual, plain, truth, slack=case.slack)
        again = results_of(case, function, inputs) if case.same_bits else actual
        for key in actual:
            assert torch.equal(actual[key], again[key]), f"{key}: other bits the second time"
        return
    skipped = [] if case.checked is None else [
        key for key in truth if key.startswith("output") and int(key.split()[1]) not in case.checked
    ]  # fmt: skip
    for key in actual.keys() - skipped:
        size = truth[key].norm()
        error, usual = ((one[key].double() - truth[key]).norm() / size for one in (actual, plain))
        # In bfloat16 the gradient of a deep network may be off by more, whoever computes it.
        limit = max(RIVAL_ERROR, 2 * usual)
        assert error < limit, f"{name}: {key} is off by {error:.1%}: not the same formula"


def widened(value: object) -> object:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def tensors(inputs: Inputs) -> list[Tensor]:
    """Without the networks' parameters."""
    return [value for value in inputs.values() if isinstance(value, Tensor)]


def input_sets(case: Case, first: Inputs) -> list[Inputs]:
    """Networks are not copied: their weights alone are larger than the cache."""
    size = sum(value.numel() * value.element_size() for value in tensors(first))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    networks = any(isinstance(value, nn.Module) for value in first.values())
    copies = 1 if case.wall or networks else max(2, -(-CACHES * cache // size))
    clones = ({key: value.clone() if isinstance(value, Tensor) else value for key, value in first.items()}
              for _ in range(copies - 1))  # fmt: skip
    return [first, *clones]


def replayable(case: Case, function: Callable, inputs: Inputs) -> tuple[Callable[[], None], int]:
    """(what one round of the clock runs, up to the end of its work on the GPU; how many calls that is)."""
    sets = [prepare(case, one) for one in input_sets(case, inputs)]
    stream = torch.cuda.Stream()  # the backward pass runs on the stream of its forward pass: all on this one
    with torch.cuda.stream(stream):
        jobs = [timed_job(case, function, *one) for one in sets]
        for job in jobs[:1] * 3 + jobs:
            job()
        stream.synchronize()
    if case.wall:
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
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds = start.elapsed_time(end) * 1e-3
        if seconds >= GRAPH_SECONDS:
            return functools.partial(_replay, graph, jobs), repeats * len(jobs)
        repeats *= max(2, int(1.2 * GRAPH_SECONDS / max(seconds, 1e-6)))


def _replay(graph: torch.cuda.CUDAGraph, _jobs: list[Callable]) -> None:
    """_jobs hold the tensors that the graph reads: without them the next capture gives their memory back."""
    graph.replay()
    torch.cuda.synchronize()


def repeatable(case: Case, function: Callable, inputs: Inputs) -> tuple[Callable[[], None], int]:
    """As `replayable`, on a CPU: one call."""
    job = timed_job(case, function, *prepare(case, inputs))
    job()
    return job, 1


def peak_bytes(case: Case, function: Callable, inputs: Inputs) -> int | None:
    """GPU memory that one call needs beyond its inputs, results included. None on a CPU, where it takes a
    process of its own: benchmarks/jobs/contrastive_memory.py."""
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


def launches(case: Case, function: Callable, inputs: Inputs) -> int | None:
    """Kernels of one call on a GPU, where the case has a goal for them."""
    if case.launches is None or case.device != "cuda":
        return None
    job = timed_job(case, function, *prepare(case, inputs))
    job()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len([name for name in on_gpu if not name.startswith(("Memcpy", "Memset"))])


def timed_job(case: Case, function: Callable, inputs: dict, grad: Tensor | None) -> Callable[[], object]:
    """What is timed: the call, its gradient, or both."""
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


def ceilings(device: str) -> dict[str, float]:
    """What this device does at best in this run: bytes per second (read and written) of its own copy, FLOP
    per second of its own matrix product (bfloat16 on a GPU, float32 on a CPU)."""
    on_gpu = device == "cuda"
    size, side = (2**29, 8192) if on_gpu else (2**26, 1024)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    c = torch.empty_like(a)
    return {
        "bytes_per_second": 2 * size / _median_seconds(lambda: target.copy_(source), on_gpu),
        "flops_per_second": 2 * side**3 / _median_seconds(lambda: torch.mm(a, a, out=c), on_gpu),
    }


def _median_seconds(job: Callable, on_gpu: bool, rounds: int = 20) -> float:
    times = []
    for _ in range(rounds):
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            job()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        else:
            before = time.perf_counter()
            job()
            times.append(time.perf_counter() - before)
    return sorted(times)[rounds // 2]
