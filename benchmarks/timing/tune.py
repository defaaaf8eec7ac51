"""Time launch configurations against the chosen one: the evidence for the constants in kernels/.

    python -m benchmarks.timing.tune [--cases TEXT ...] [--output FILE.json] [--compile-only K/N]

For every case of `variations` ours is timed as in the benchmarks (graph replay, inputs larger than the L2
cache), first unchanged, then with each variation. A variation that gives other results or does not compile is
reported as failed; after one that breaks the GPU's context, a new process continues. No source is changed.
Whoever changes a constant adds a line to results/tuning.md.

--compile-only K/N runs every N-th variation once, beginning with the K-th, and times nothing: N processes in
parallel fill Triton's cache for the one that times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks.cases import registry
from benchmarks.timing.agreement import ours, results_of
from benchmarks.timing.clock import gpu_round
from benchmarks.timing.provenance import write
from benchmarks.timing.variations import Change, variations
from dalle2_fast.kernels.group_norm_silu import _plan as norm_plan

ROUNDS = 10
TOLERANCE = 0.02  # of the norm; another configuration may round in other places, but not change the formula


@contextlib.contextmanager
def changed(changes: list[Change]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for target, name, value in changes:
            stack.enter_context(mock.patch.object(target, name, value))
        for cached in (norm_plan.resident_tiles, norm_plan.forward_tiles, norm_plan.chunk_tiles,
                       norm_plan.sum_tiles):  # fmt: skip
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield


def microseconds(run: Callable[[], None], calls: int) -> float:
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) / calls * 1e6)
    return statistics.median(times)


def difference(found: dict, wanted: dict) -> float:
    return max(
        float((found[key] - wanted[key]).norm() / wanted[key].norm().clamp_min(1e-20)) for key in wanted
    )


def is_lost() -> bool:
    """Whether the GPU rejects all further work of this process, as after an illegal memory access."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--cases", nargs="+", help="beginnings of the names of cases")
    parser.add_argument("--output", type=Path, help="a JSON file of the rows")
    parser.add_argument("--compile-only", metavar="K/N", help="see above; times nothing")
    parser.add_argument("--first", type=int, default=0, help="number of the variation to begin with")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    cases = registry.load()
    part, parts = map(int, (arguments.compile_only or "0/1").split("/"))
    wanted, rows, case, base = {}, [], None, 0.0
    if arguments.first and arguments.output and arguments.output.exists():
        rows = json.loads(arguments.output.read_text())
    for index, (name, what, changes) in enumerate(variations()):
        if arguments.cases and not any(name.startswith(text) for text in arguments.cases):
            continue
        if index < arguments.first or arguments.compile_only and index % parts != part:
            continue
        if case is None or case.name != name:
            case = cases[name]
            with torch.random.fork_rng(devices=[0]):
                inputs = case.make("cuda", torch.bfloat16, False)
            if not arguments.compile_only:
                wanted = results_of(case, ours(case, "fused"), inputs)
                wanted = {key: value.double() for key, value in wanted.items()}
                base = microseconds(*gpu_round(case, ours(case, "fused"), inputs))
                rows.append(dict(case=name, variation="as it is", us=base))
                print(f"{name}: as it is {base:.2f} us", flush=True)
        try:
            with changed(changes):
                found = results_of(case, ours(case, "fused"), inputs)
                torch.cuda.synchronize()
                if arguments.compile_only:
                    continue
                off = difference(found, wanted)
                if not off < TOLERANCE:
                    raise ValueError(f"other results, relative difference {off:.1%}")
                us = microseconds(*gpu_round(case, ours(case, "fused"), inputs))
        except Exception as error:  # from a compiler, a launch or the check; the next variation may work
            reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:120]}"
            print(f"    {what}: {reason}", flush=True)
            rows.append(dict(case=name, variation=what, failed=reason))
        else:
            rows.append(dict(case=name, variation=what, us=us))
            print(f"    {what}: {us:.2f} us, {us / base:.3f}", flush=True)
        if arguments.output:
            write(arguments.output, json.dumps(rows, indent=1) + "\n")
        if "failed" in rows[-1] and is_lost():
            print("    this process can no longer use the GPU; a new one continues", flush=True)
            command = [sys.executable, "-m", "benchmarks.timing.tune", *sys.argv[1:]]
            return subprocess.call([*command, "--first", str(index + 1)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
