"""Times launch configurations beside the chosen one: what the constants of kernels/ are decided by.

    python -m benchmarks.timing.tune [--cases TEXT ...] [--output FILE.json] [--compile-only K/N]

For every case of variations() ours is timed as in the benchmarks (graph replay, inputs past L2), first as it
is, then with each variation in its place. A variation that gives other results or does not compile says so;
after one that breaks the GPU's context another process goes on. Nothing is changed: who changes a constant
writes a line in results/tuning.md.

--compile-only K/N runs every N-th variation once, the K-th first, and times nothing: N processes side by side
fill Triton's cache, then one times.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]

import torch  # noqa: E402

from benchmarks.cases import registry  # noqa: E402
from benchmarks.timing.clock import ours, replayable, results_of  # noqa: E402
from dalle2_fast.kernels.contrastive import _tiles  # noqa: E402
from dalle2_fast.kernels.cross_attention import _common, _short_backward  # noqa: E402
from dalle2_fast.kernels.cross_attention import forward as cross_attention  # noqa: E402
from dalle2_fast.kernels.diffusion import _statistics  # noqa: E402
from dalle2_fast.kernels.diffusion import step as diffusion_step  # noqa: E402
from dalle2_fast.kernels.group_norm_silu import _plan  # noqa: E402
from dalle2_fast.kernels.group_norm_silu import forward as group_norm_silu  # noqa: E402

ROUNDS = 10
TOLERANCE = 0.02  # of the norm: another configuration rounds elsewhere, it does not compute something else


class Change(NamedTuple):
    """What stands in for `name` of `place` while a variation runs."""

    place: object
    name: str
    value: object


class WithOptions:
    """A kernel that is launched with other options."""

    def __init__(self, kernel, **options) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.kernel[grid](*args, **(kwargs | self.options))


def constant(place, **values) -> list[Change]:
    return [Change(place, name, value) for name, value in values.items()]


def options(place, kernel: str, **values) -> list[Change]:
    return [Change(place, kernel, WithOptions(getattr(place, kernel), **values))]


def config(place, only: str | None = None, **values) -> list[Change]:
    """Launch configurations with these values; `only`: of the kernel called so."""
    chosen = place._launch_config

    def changed(*args):
        return chosen(*args) | (values if only in (None, args[0]) else {})

    return [Change(place, "_launch_config", changed)]


def shared_out(of: int, parts: int | None = None, **values) -> list[Change]:
    """Another idea of how many programs of attention run at once and what starting one costs, or of `parts`,
    their number for each (batch, head). Of the launcher that says `resident=of`: 2 forward, 1 backward."""
    split = _common.split

    def changed(pairs, tiles, capability, resident, overhead):
        usual = dict(resident=resident, overhead=overhead)
        if resident == of and parts:
            return parts
        return split(pairs, tiles, capability, **(usual | (values if resident == of else {})))

    return [Change(_common, "split", changed)]


_WARPS = _plan._warps


def said(place, kernel: str, *texts: tuple[str, str]) -> list[Change]:
    """A kernel whose source says something else: (text, other text)."""
    source = inspect.getsource(getattr(place, kernel).fn)
    for text, other in texts:
        if text not in source:
            raise ValueError(f"{kernel}: expected {text!r} in it")
        source = source.replace(text, other)
    folder = Path(tempfile.mkdtemp())  # triton.jit reads the file again
    path = folder / f"said_{len(sys.modules)}.py"
    names = ", ".join(name for name in vars(place) if not name.startswith("__") and name != "annotations")
    path.write_text(f"from {place.__name__} import {names}\n{source}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [Change(place, kernel, getattr(module, kernel))]


def variations() -> Iterator[tuple[str, str, list[Change]]]:
    """(case, what is other, changes)"""
    looped = group_norm_silu, "_looped_kernel"
    first = (', eviction_policy="evict_first"', "")
    keep = ("mask=inside, other=0.0)", 'mask=inside, other=0.0, eviction_policy="evict_last")')
    for case in ("norm film silu forward", "norm silu forward"):
        yield case, "no cache hints", said(*looped, first)
        yield case, "a hint in the first pass, too", said(*looped, keep)
        for registers in (40, 48):
            yield case, f"{registers} registers", options(*looped, maxnreg=registers)
        for lanes, warps in ((2048, 8), (4096, 8), (4096, 16), (8192, 8), (8192, 32), (16384, 32)):
            yield case, f"{lanes} lanes, {warps} warps", constant(
                _plan, FORWARD_LANES=lanes, FORWARD_WARPS=warps
            )
        yield case, "4096 lanes, 16 warps, 40 registers", constant(
            _plan, FORWARD_LANES=4096, FORWARD_WARPS=16
        ) + options(*looped, maxnreg=40)
        yield case, "resident", constant(_plan, RESIDENT_LANES=40960)
    case = "norm silu forward channels_last"
    for lanes, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16)):
        for programs in (4, 8, 16):
            if (lanes, warps, programs) != (4096, 4, 8):
                yield case, f"{lanes} lanes, {warps} warps, {programs} programs", constant(
                    _plan, CHUNK_LANES=lanes, CHUNK_WARPS=warps, COLUMN_PROGRAMS=programs
                )
    yield case, "moments in 64 registers", options(group_norm_silu, "_moments_kernel", maxnreg=64)
    yield case, "moments, loop not unrolled", said(
        group_norm_silu, "_moments_kernel", (", loop_unroll_factor=2", "")
    )
    for groups in (2, 4, 8):
        for lanes, warps in ((4096, 8), (8192, 16)):
            yield case, f"read twice by one program, {groups} groups, {lanes} lanes, {warps} warps", constant(
                _plan, _few_groups=lambda width, count, itemsize, groups=groups: groups,
                FORWARD_MOST=1 << 20, FORWARD_LANES=lanes, FORWARD_WARPS=warps,
            )  # fmt: skip
    case = "norm silu forward upsampler"
    for lanes, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 4), (8192, 8)):
        for programs in (16, 32, 64):
            if (lanes, warps, programs) != (4096, 4, 64):
                yield case, f"{lanes} lanes, {warps} warps, {programs} programs", constant(
                    _plan, CHUNK_LANES=lanes, CHUNK_WARPS=warps, ROW_PROGRAMS=programs
                )
    yield case, "2048 lanes, 4 warps, loop unrolled 4 times", constant(
        _plan, CHUNK_LANES=2048, CHUNK_WARPS=4
    ) + said(group_norm_silu, "_moments_kernel", ("loop_unroll_factor=2", "loop_unroll_factor=4"))
    case = "norm film silu backward"
    for lanes, warps in ((2048, 4), (2048, 8), (4096, 8), (8192, 16)):
        yield case, f"looped, {lanes} lanes, {warps} warps", constant(
            _plan, LOOPED_LANES=lanes, LOOPED_WARPS=warps
        )
    case = "norms of the decoder, batch 2"
    for programs in (2, 4, 16):
        yield case, f"{programs} programs", constant(_plan, COLUMN_PROGRAMS=programs)
    for merged in (128, 1024):
        yield case, f"{merged} moments merged", constant(_plan, MERGED_MOMENTS=merged)
    for lanes, warps in ((2048, 8), (8192, 8)):
        yield case, f"chunks of {lanes} lanes, {warps} warps", constant(
            _plan, CHUNK_LANES=lanes, CHUNK_WARPS=warps
        )
    for lanes in (8192, 16384, 32768):
        yield case, f"resident up to {lanes}", constant(_plan, RESIDENT_LANES=lanes)
    for lanes, warps in ((4096, 8), (4096, 16), (16384, 32)):
        yield case, f"read twice in tiles of {lanes}, {warps} warps", constant(
            _plan, FORWARD_LANES=lanes, FORWARD_WARPS=warps
        )
    yield case, "read twice up to 32768", constant(_plan, FORWARD_MOST=32768)
    yield case, "read twice up to 131072", constant(_plan, FORWARD_MOST=131072)
    for groups in (2, 4):
        yield case, f"{groups} groups a program", constant(
            _plan, _few_groups=lambda width, count, itemsize, groups=groups: groups
        )
    for factor in (2, 4):
        yield case, f"a {factor}th of the values a thread", [
            Change(_plan, "_warps", lambda lanes, factor=factor: min(32, _WARPS(lanes) * factor))
        ]

    for case in ("cross-attention forward", "cross-attention forward masked"):
        for rows, warps, stages in ((64, 4, 2), (64, 4, 4), (128, 8, 3), (128, 4, 3)):
            yield case, f"{rows} queries, {warps} warps, {stages} stages", config(
                cross_attention, BLOCK_T=rows, num_warps=warps, num_stages=stages
            )
        for parts in (3, 5, 10, 13, 16):
            yield case, f"{parts} parts", shared_out(2, parts)
        yield case, "all checks", constant(
            _common, short_checks=lambda *sizes: {"CHECKED_KEYS": True, "CHECKED_ROWS": True}
        )
    case = "cross-attention forward and backward"
    for rows, warps, stages in ((128, 8, 2), (128, 8, 4), (64, 8, 2), (64, 8, 3)):
        yield case, f"{rows} queries, {warps} warps, {stages} stages", config(
            _short_backward, BLOCK_T=rows, num_warps=warps, num_stages=stages
        )
    for parts in (2, 3, 5, 8):
        yield case, f"{parts} parts", shared_out(1, parts)
    for case in ("unclip attention, batch 2", "unclip attention, batch 64"):
        for rows, keys, warps, stages in (
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3),
            (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 2),
            (128, 64, 4, 4),
        ):  # fmt: skip
            yield case, f"{rows} queries, {keys} keys, {warps} warps, {stages} stages", config(
                cross_attention, BLOCK_T=rows, BLOCK_S=keys, num_warps=warps, num_stages=stages
            )

    for case in ("diffusion step, decoder, batch 4", "diffusion step, 256 px, batch 64",
                 "diffusion step, dynamic threshold, batch 64"):  # fmt: skip
        for size, warps in ((256, 2), (512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 8)):
            yield case, f"{size} elements, {warps} warps", constant(
                diffusion_step, tile_config=lambda positions, both=(size, warps): both
            )
    for tile, warps in ((4096, 8), (4096, 16), (8192, 8), (8192, 32), (16384, 16), (16384, 32)):
        yield "diffusion step, dynamic threshold, batch 64", f"statistics of {tile}, {warps} warps", constant(
            _statistics, _config=lambda elements, both=(tile, warps): (False, *both)
        )

    # Last, for an earlier form of this kernel made an illegal memory access so (one stage, Triton 3.6).
    case = "cross-attention forward and backward"
    for stages, parts in ((3, 3), (2, 3), (3, 8), (1, 3)):
        yield case, f"64 queries, 4 warps, {stages} stages, {parts} parts", config(
            _short_backward, BLOCK_T=64, num_warps=4, num_stages=stages
        ) + shared_out(1, parts)

    for case in ("contrastive loss, N = 32768, D = 512", "contrastive loss, N = 32768, D = 1024"):
        for megabytes, columns in (
            (256, 16384), (256, 8192), (128, 16384), (64, 8192), (32, 4096), (512, 32768),
        ):  # fmt: skip
            yield case, f"gradients of {megabytes} MB, {columns} columns", constant(
                _tiles.OnCuda,
                budget_of_gradients=megabytes << 20,
                most_columns_of_gradients=columns,
            )


@contextlib.contextmanager
def changed(changes: list[Change]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for place, name, value in changes:
            stack.enter_context(mock.patch.object(place, name, value))
        for cached in (_plan.resident_tiles, _plan.forward_tiles, _plan.chunk_tiles,
                       _plan.sum_tiles):  # fmt: skip
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
    """Whether the GPU refuses all further work of this process, as after an illegal memory access."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", help="texts that a case's name has to begin with")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--compile-only", metavar="K/N")
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
                base = microseconds(*replayable(case, ours(case, "fused"), inputs))
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
                    raise ValueError(f"other results, off by {off:.1%}")
                us = microseconds(*replayable(case, ours(case, "fused"), inputs))
        except Exception as error:  # of a compiler, of a launch, of the check: the next one may do
            reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:120]}"
            print(f"    {what}: {reason}", flush=True)
            rows.append(dict(case=name, variation=what, failed=reason))
        else:
            rows.append(dict(case=name, variation=what, us=us))
            print(f"    {what}: {us:.2f} us, {us / base:.3f}", flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
        if "failed" in rows[-1] and is_lost():
            print("    no further work on the GPU in this process; the next one goes on", flush=True)
            return subprocess.call([sys.executable, *sys.argv, "--first", str(index + 1)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
