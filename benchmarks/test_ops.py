"""Time every case of the registry against its rivals on this device.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json && python -m benchmarks.report run.json
    pytest benchmarks/ --benchmark-only --quick                     # every row once, under 8 minutes
    pytest benchmarks/test_ops.py -k "norm and ours"

First the check: an implementation that disagrees with the reference in float64 is not timed, it fails. A
rival that is not installed is listed as absent. Without a GPU the rows that a CPU can run are timed, and the
others say that they need one.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason='pytest-benchmark is not installed: pip install -e ".[bench]"')

import cases_contrastive  # noqa: F401  (its rows join the registry)
from cases import CASES
from clock import NotTimed, ceilings, check, ours, peak_bytes, repeatable, replayable
from conftest import ROWS, Row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = [(name, kind) for name, case in CASES.items() for kind in ("ours", *case.rivals)]


@pytest.fixture(scope="session")
def best() -> dict[str, float]:
    return ceilings(DEVICE)


@pytest.mark.parametrize("name, kind", IMPLEMENTATIONS)
def test_time(name, kind, benchmark, best, request):
    case = CASES[name]
    title = name if DEVICE == "cuda" else f"{name.split(',')[0]} (CPU)"
    function = ours(case, "fused") if kind == "ours" else case.rivals[kind]
    if DEVICE == "cpu" and case.make_cpu is None:
        pytest.skip("needs a CUDA device")
    if isinstance(function, str):
        ROWS.append(Row(title, kind, absent=function))
        pytest.skip(function)
    quick = request.config.getoption("quick")
    if DEVICE == "cpu" and kind.endswith("amp"):
        pytest.skip("no autocast on a CPU: the same as without")
    if DEVICE == "cpu" and "compile" in kind and quick:
        pytest.skip("compiling takes longer than --quick allows")
    inputs = case.make_cpu() if DEVICE == "cpu" else case.make("cuda", torch.bfloat16, False)
    try:
        checked = inputs if case.make_check is None else case.make_check(DEVICE, inputs_dtype(inputs))
        check(case, kind, function, checked)
        run, calls = (repeatable if DEVICE == "cpu" else replayable)(case, function, inputs)
        memory = peak_bytes(case, function, inputs)
    except (NotTimed, RuntimeError) as error:
        if kind == "ours":
            raise
        reason = f"{kind} cannot run this: {str(error).splitlines()[0]}"
        ROWS.append(Row(title, kind, absent=reason))
        pytest.skip(reason)
    rounds = (3 if quick else 5) if DEVICE == "cpu" else (10 if quick else 30)
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=0 if DEVICE == "cpu" else 3)

    times = benchmark.stats.stats
    # The registry counts the bytes and FLOPs of the full size; a CPU is given less.
    share = 1.0 if DEVICE == "cuda" else work(inputs) / work(case.make("meta", torch.bfloat16, False))
    seconds, spread = times.median / calls, times.iqr / times.median
    row = Row(
        title, kind, seconds=seconds, spread=spread, rounds=rounds, peak_bytes=memory,
        bytes_per_second=case.bytes * share / seconds, flops_per_second=case.flops * share**2 / seconds,
        target_us=case.target_us if DEVICE == "cuda" else None, wanted_factor=case.factors.get(kind),
        shape=list(next(iter(inputs.values())).shape),
    )  # fmt: skip
    row.share_of_best = max(
        row.bytes_per_second / best["bytes_per_second"], row.flops_per_second / best["flops_per_second"]
    )
    ROWS.append(row)
    benchmark.extra_info.update(row.to_json() | {"ceilings": best})


def inputs_dtype(inputs) -> torch.dtype:
    return next(value.dtype for value in inputs.values() if value is not None)


def work(inputs) -> int:
    """Rows of the features: bytes grow with them, FLOPs with their square."""
    return len(next(iter(inputs.values())))
