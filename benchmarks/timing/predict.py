"""Predicted times of a GPU session's rows on an H200, beside an empty column for what is measured.

    python -m benchmarks.timing.predict        writes benchmarks/results/predictions.md

A lower bound is the time of the bytes at the measured copy rate, or that of the FLOPs at the measured rate of
a matrix product, whichever is longer, and the shortest time of a kernel for each launch. The prediction
divides both rates by what rows of the same kind reached when they were measured (MEASURED, 2026-11-26). A
network is the sum over its ops, which run on tensors without storage. Nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # so that the launchers of our ops run on the CPU

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.cases import networks, registry, sizes
from benchmarks.jobs.session import STAGES
from benchmarks.jobs.session_rows import MODULES, number
from benchmarks.timing.agreement import ours, prepare
from benchmarks.timing.clock import timed_job
from benchmarks.timing.compile_report import bytes_of, launches_of
from benchmarks.timing.launch_counts import CountLaunches
from benchmarks.timing.provenance import RESULTS, write
from dalle2_fast.ops import _dispatch
from tests.support.aot.compile import compile_cases, fingerprint, function_of
from tests.support.launches import Launch, as_case

TEXT = RESULTS / "predictions.md"
RESULT = RESULTS / "nvidia-h200.json"
CALIBRATED_ON = "0a2e44d9d3"  # the commit of RESULT that MEASURED is from; a later one fills the empty column


class Measured(NamedTuple):
    """A row on the H200: microseconds; launches, bytes that they move and FLOPs of the kernels at that time.
    """

    us: float
    launches: int
    moved: float
    flops: float = 0.0

    @property
    def kind(self) -> str:
        return "FLOPs" if self.flops / PRODUCT > self.moved / COPY else "bytes"

    @property
    def is_small(self) -> bool:
        """Whether the launches take most of the time, so that the rest tells no rate."""
        return self.moved < SMALL_BYTES * self.launches and not self.flops

    @property
    def reached(self) -> float:
        """The share of the rate, without the launches."""
        return 1e6 * max(self.moved / COPY, self.flops / PRODUCT) / (self.us - self.launches * SHORTEST)


COPY, PRODUCT = 4.090e12, 784.9e12  # bytes and FLOPs per second: nvidia-h200.md
MEASURED = {  # nvidia-h200.md; h200-sweep-2.json, "as it is", for rows that are not there
    "norm film silu forward": Measured(99.5, 1, 335.6e6),
    "norm silu forward": Measured(99.6, 1, 335.6e6),
    "norm silu forward channels_last": Measured(185.5, 2, 503.4e6),
    "norm silu forward upsampler": Measured(270.6, 2, 1006.6e6),
    "norm film silu backward": Measured(203.5, 2, 503.9e6),
    "norms of the decoder, batch 2": Measured(1093.5, 112, 588.7e6),
    "cross-attention forward": Measured(54.4, 1, 170.9e6, 12.92e9),
    "cross-attention forward masked": Measured(59.0, 1, 170.9e6, 12.92e9),
    "cross-attention forward and backward": Measured(222.4, 3, 481.3e6, 45.21e9),
    "unclip attention, batch 2": Measured(29.8, 1, 11.0e6, 5.79e9),
    "unclip attention, batch 64": Measured(543.9, 1, 351.4e6, 185.4e9),
    "diffusion step, decoder, batch 4": Measured(2.5, 1, 0.69e6),
    "diffusion step, 256 px, batch 64": Measured(45.7, 1, 176.2e6),
    "diffusion step, dynamic threshold, batch 64": Measured(246.9, 2, 251.7e6),
    "contrastive loss, N = 32768, D = 512": Measured(7971.9, 0, 134.2e6, 4398e9),
    "contrastive loss, N = 32768, D = 1024": Measured(14373.8, 0, 268.4e6, 8796e9),
}
SHORTEST = 2.4  # us of a kernel in a CUDA graph: the diffusion step of 0.7 MB
SMALL_NORM = MEASURED["norms of the decoder, batch 2"].us / 112  # us: chains of loads, sums and barriers
SMALL_BYTES = 16e6  # a launch that moves less says nothing about the rate
# Not measured: the share of the rates that PyTorch's kernels reach, and the host's time for an op.
OF_TORCH = {"bytes": 0.8, "FLOPs": 0.6}
HOST = 5.0  # us


def module_of(name: str) -> str:
    kinds = {"norm": "norm", "diffusion step": "step", "loss": "loss"}
    return next((kind for words, kind in kinds.items() if words in name), "attention")


def bound(launches: int, moved: float, flops: float) -> float:
    """The shortest time in microseconds."""
    return max(launches * SHORTEST, 1e6 * moved / COPY, 1e6 * flops / PRODUCT)


@functools.cache
def reached(module: str) -> dict[str, float]:
    """The share of the copy's and of the product's rate that measured rows of a kind reached, the median."""
    shares: dict[str, list[float]] = {"bytes": [], "FLOPs": []}
    for name, row in MEASURED.items():
        if module_of(name) == module and not row.is_small:
            shares[row.kind].append(row.reached)
    return {kind: statistics.median(some) if some else OF_TORCH[kind] for kind, some in shares.items()}


def predicted(launches: int, moved: float, flops: float, share: dict[str, float]) -> float:
    rate = max(moved / (COPY * share["bytes"]), flops / (PRODUCT * share["FLOPs"]))
    return launches * SHORTEST + 1e6 * rate


def of_kernels(name: str, launches: int, moved: float, flops: float) -> float:
    """Predicted microseconds of a row of ops."""
    if module_of(name) == "norm" and moved < SMALL_BYTES * launches:
        return launches * SMALL_NORM
    return predicted(launches, moved, flops, reached(module_of(name)))


# ------------------------------------------------------------------------------------------------- networks


class Costs(CountLaunches):
    """Sums the bounds and the predictions of all ops that make or change data, on tensors without storage."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.moved, self.flops, self.least, self.predicted = 0, 0.0, 0.0, 0.0, 0.0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        before = self.op_count + sum(self.ours.values())
        result = super().__torch_dispatch__(op, types, args, kwargs)
        if self.op_count + sum(self.ours.values()) > before:
            self._count(op, args, kwargs or {}, result)
        return result

    def _count(self, op, args, kwargs, result) -> None:
        name, moved, flops = op._schema.name, size_of((args, kwargs, result)), 0
        share, shortest = OF_TORCH, SHORTEST
        if "cross_attention" in name:
            given = dict(zip((one.name for one in op._schema.arguments), args, strict=False))
            keys = sum(given[key].shape[2] for key in ("context_k", "image_k") if given[key] is not None)
            flops, share = attention_flops(given["q"], keys, "backward" in name), reached("attention")
        elif "group_norm_silu" in name:
            share, shortest = reached("norm"), SMALL_NORM if moved < SMALL_BYTES else SHORTEST
        elif op._overloadpacket in flop_registry:
            flops = flop_registry[op._overloadpacket](*args, **kwargs, out_val=result)
        self.add(moved, flops, share, shortest)

    def add(self, moved: float, flops: float, share: dict[str, float], shortest: float = SHORTEST) -> None:
        self.launches, self.moved, self.flops = self.launches + 1, self.moved + moved, self.flops + flops
        self.least += bound(1, moved, flops)
        self.predicted += max(shortest, predicted(0, moved, flops, share))


def size_of(values) -> int:
    return sum(one.numel() * one.element_size() for one in tree_leaves(values) if isinstance(one, Tensor))


def attention_flops(q: Tensor, keys: int, backward: bool) -> int:
    """Two products forward, five backward."""
    return (10 if backward else 4) * math.prod(q.shape) * keys


class OneAttention(torch.autograd.Function):
    """PyTorch's attention as one kernel: without storage it would be counted as its formula."""

    @staticmethod
    def forward(ctx, costs: Costs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.costs = costs
        ctx.save_for_backward(q, k, v)
        costs.add(2 * size_of((q, k, v)), attention_flops(q, k.shape[-2], False), OF_TORCH)
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        q, k, v = ctx.saved_tensors
        ctx.costs.add(3 * size_of((q, k, v)), attention_flops(q, k.shape[-2], True), OF_TORCH)
        return None, *(one.new_empty(one.shape) for one in (q, k, v))


def costs(run: Callable[[], object], gradient: bool, impl: str) -> Costs:
    found = Costs()

    def attention(q, k, v, *_, **__):
        return OneAttention.apply(found, q, k, v)

    with (
        torch.set_grad_enabled(gradient),
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),  # raises for the device "meta"
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(_dispatch, "use_reference", lambda *_, **__: impl == "reference"),
        found,
    ):
        run()
    return found


def of_case(name: str, impl: str = "fused") -> Costs:
    """A row that is a network: ours, or with the reference of every op."""
    case = registry.CASES[name]
    inputs = case.make("meta", torch.bfloat16, False)
    function = case.rivals["unpatched"] if impl == "reference" and "unpatched" in case.rivals else None
    if function is None:
        function = ours(case, impl)
    elif hasattr(function, "ready"):
        function.ready(inputs)
    if not case.backward:
        return costs(lambda: function(**inputs), False, impl)
    return costs(timed_job(case, function, *prepare(case, inputs)), True, impl)


@functools.cache
def network(build: Callable, inputs_of: Callable, batch: int, impl: str) -> Costs:
    net = sizes.seeded_network(build, sizes.KARLO, "meta", torch.bfloat16)
    given = inputs_of(sizes.KARLO, net, batch, "meta", torch.bfloat16)
    return costs(lambda: networks.forward(impl, net, **given), False, impl)


class Line(NamedTuple):
    row: str
    launches: str
    moved: float
    flops: float
    occupancy: str
    least: float  # us
    predicted: float


def of_jobs() -> Iterator[Line]:
    """Whole runs and networks. The clock replays networks as CUDA graphs; steps of training and captions take
    at least the host's time, unless they are captured."""
    for impl, kind in (("fused", "ours"), ("fused", "ours, without graphs"), ("reference", "reference")):
        passes = ((sizes.prior, sizes.prior_inputs, 8, 25), (sizes.decoder, sizes.unet_inputs, 8, 25),
                  (sizes.upsampler, sizes.unet_inputs, 4, 7))  # fmt: skip
        found = [(network(build, inputs_of, batch, impl), times) for build, inputs_of, batch, times in passes]
        total = {field: sum(times * getattr(one, field) for one, times in found)
                 for field in ("launches", "moved", "flops", "least")}  # fmt: skip
        host = 0.0 if kind == "ours" else HOST
        expected = sum(times * max(one.predicted, host * one.launches) for one, times in found)
        yield Line(f"caption to 256 px, 4 images / {kind}", f"{total['launches']}", total["moved"],
                   total["flops"], "", total["least"], expected)  # fmt: skip
    for name in STAGES["jobs"][1:]:
        case = registry.CASES[name]
        for impl in ("fused", "reference"):
            counted, optimiser = name.replace("training step", "loss and gradient"), 0.0
            one = of_case(counted, impl)
            if counted != name:  # the bytes of the loss's case are 6 for each parameter, of AdamW 40
                optimiser = 40 / 6 * number(registry.CASES[counted].bytes)
            moved = one.moved + optimiser
            extra = 1e6 * optimiser / COPY
            expected = one.predicted + extra / OF_TORCH["bytes"]
            if case.wall_clock:
                expected = max(expected, HOST * one.launches)
            kind = "ours" if impl == "fused" else "unpatched" if "unpatched" in case.rivals else "reference"
            yield Line(f"{name} / {kind}", f"{one.launches}", moved, one.flops, "", one.least + extra,
                       expected)  # fmt: skip


def of_ops(stage: str, occupied: Callable[[list[Launch]], str]) -> Iterator[Line]:
    for name in STAGES[stage]:
        case = registry.CASES[name]
        flops = number(case.flops)
        if stage == "losses":  # their kernels are in the native module, which launches them itself
            launches, text, moved, used = 0, "", number(case.bytes), ""
        else:
            found = launches_of(case, ours(case, "fused"))
            launches, moved, text = len(found), sum(map(bytes_of, found)), f"{len(found)}"
            used = occupied(found)
        expected = of_kernels(name, launches, moved, flops)
        if case.wall_clock:
            expected = max(expected, HOST * launches)
        yield Line(f"{name} / ours", text, moved, flops, used, bound(1, number(case.bytes), flops), expected)


def occupancy(launches: list[Launch]) -> str:
    """Of each kernel the warps on a multiprocessor of an H200 in per cent of the 64 that it can hold, from
    what the kernel takes when it is compiled for this launch."""
    cases = {}
    for launch in launches:
        case = as_case("", launch, launch.kernel.kwargs.get("do_not_specialize") or ())
        cases[fingerprint(case)] = case._replace(name=fingerprint(case), capabilities=(90,))
    found: dict[str, list[float]] = {}
    for (name, _), used in compile_cases(cases.values(), (90,)).items():
        warps = cases[name].num_warps
        registers = -(-used.registers // 8) * 8 * 32 * warps
        programs = min(65536 // registers, 227 * 1024 // (used.shared + 1024), 64 // warps, 32)
        found.setdefault(function_of(cases[name].kernel).__name__, []).append(programs * warps / 64)
    return ", ".join(f"{min(some):.0%}" + f" to {max(some):.0%}" * (min(some) < max(some))
                     for some in found.values())  # fmt: skip


# -------------------------------------------------------------------------------------------------- as text


def figure(us: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def as_text(measured: dict[str, float], occupied: Callable[[list[Launch]], str] = occupancy) -> str:
    """measured: microseconds by row, once there are some."""
    registry.load(MODULES)
    _dispatch.load_kernels(torch.device("cpu"))
    lines = [
        "# Predicted times on an H200",
        "",
        "Written by `python -m benchmarks.timing.predict`; `benchmarks/gpu_session.sh` measures the rows.",
        f"Measured rates: copy {COPY / 1e9:.0f} GB/s, product {PRODUCT / 1e12:.0f} TFLOP/s. A kernel takes "
        f"at least {SHORTEST} us,",
        f"a small norm {SMALL_NORM:.1f} us (measured; kernels that changed since then have their own "
        "predictions in `tuning.md`).",
        f"Assumed, not measured: PyTorch's kernels reach {OF_TORCH['bytes']:.0%} of the copy and "
        f"{OF_TORCH['FLOPs']:.0%} of the product, and the host",
        f"takes {HOST:.0f} us for an op. `at least`: the lower bound at the full rates. `occupancy`: of each "
        "kernel, the warps on a",
        "multiprocessor in per cent of those that it can hold.",
        "",
        "| row | launches | MB | GFLOP | occupancy | at least, us | predicted, us | measured, us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in (*of_jobs(), *of_ops("ops", occupied), *of_ops("losses", occupied)):
        known = figure(measured[line.row]) if line.row in measured else ""
        cells = (line.row, line.launches, f"{line.moved / 1e6:.0f}", f"{line.flops / 1e9:.0f}",
                 line.occupancy, figure(line.least), figure(line.predicted), known)  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *calibration()]) + "\n"


def calibration() -> list[str]:
    """The lines of the second table."""
    lines = [
        "## The model against the rows that were measured",
        "",
        "`reached`: share of the copy's or the product's rate, without the launches; the model takes the "
        "median of a kind.",
        "The kernels are those of 2026-11-26, and the shares were taken from these very rows.",
        "",
        "| row | launches | MB | GFLOP | reached | predicted, us | measured, us | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in MEASURED.items():
        expected = of_kernels(name, row.launches, row.moved, row.flops)
        share = "" if row.is_small else f"{row.reached:.0%} of {row.kind}"
        lines.append(f"| {name} | {row.launches or ''} | {row.moved / 1e6:.0f} | {row.flops / 1e9:.0f} | "
                     f"{share} | {figure(expected)} | {row.us:.1f} | "
                     f"{expected / row.us - 1:+.0%} |")  # fmt: skip
    return lines


def measured_since() -> dict[str, float]:
    """"row / implementation" -> microseconds, of a result that is newer than MEASURED."""
    result = json.loads(RESULT.read_text())
    if result["commit"] == CALIBRATED_ON:
        return {}
    return {f"{row['case']} / {row['implementation']}": 1e6 * row["seconds"] for row in result["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing.predict", description=__doc__.splitlines()[0]
    )
    parser.parse_args()
    write(TEXT, as_text(measured_since()))


if __name__ == "__main__":
    main()
