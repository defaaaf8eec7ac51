"""Time every case of the registry against its rivals on this device.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.timing.report run.json
    pytest benchmarks/ --benchmark-only --quick                     # every row once, 8 minutes at most
    pytest benchmarks/ --benchmark-only -k "norm and ours"          # --threads 2: of a CPU

First the check: an implementation that disagrees with the reference in float64 is not timed, it fails. A
rival that is not installed or cannot run is listed as absent, with the reason. Ours runs before every round
of a rival, so that whatever else the machine does meets both. Without a GPU the rows that a CPU can run are
timed, and the others are listed as needing one.
"""

from __future__ import annotations

import gc
import statistics
import time

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason='pytest-benchmark is not installed: pip install -e ".[bench]"')

from benchmarks.cases import registry
from benchmarks.timing.clock import (
    NotTimed,
    ceilings,
    check,
    launches,
    ours,
    peak_bytes,
    repeatable,
    replayable,
)
from benchmarks.timing.rows import ROWS, Row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = registry.load()
IMPLEMENTATIONS = [(name, kind) for name, case in CASES.items() for kind in ("ours", *case.rivals)]
START = time.monotonic()
VERDICTS: dict[str, Exception | None] = {}  # of the check of ours, by case; None: it is right


@pytest.fixture(scope="session")
def best() -> dict[str, float]:
    return ceilings(DEVICE)


@pytest.fixture(autouse=True)
def room():
    """What the last row held on the GPU is given back."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def absent(name: str, kind: str, reason: str):
    ROWS.append(Row(name, kind, absent=reason))
    pytest.skip(reason)


def checked_inputs(case: registry.Case, dtype: torch.dtype, inputs):
    return inputs if case.make_check is None else case.make_check(case.device, dtype)


def verdict_on_ours(case: registry.Case, dtype: torch.dtype, inputs) -> Exception | None:
    if case.name not in VERDICTS:
        try:
            check(case, "ours", ours(case, "fused"), checked_inputs(case, dtype, inputs))
            VERDICTS[case.name] = None
        except (AssertionError, RuntimeError) as error:
            VERDICTS[case.name] = error
    return VERDICTS[case.name]


@pytest.mark.parametrize("name, kind", IMPLEMENTATIONS)
def test_time(name, kind, benchmark, best, request):
    case = CASES[name]
    if case.device != DEVICE:
        if kind == "ours":
            needed = "a CUDA device" if DEVICE == "cpu" else "a machine without a CUDA device"
            ROWS.append(Row(name, kind, absent=f"needs {needed}"))
        pytest.skip(f"is timed on {case.device}")
    if case.package is not None and not registry.installed(case.package):
        absent(name, kind, f"{case.package} is not installed")
    function = ours(case, "fused") if kind == "ours" else case.rivals[kind]
    if isinstance(function, str):
        absent(name, kind, function)
    quick, minutes = request.config.getoption("quick"), request.config.getoption("minutes")
    if time.monotonic() - START > 60 * (minutes or (8 if quick else float("inf"))):
        absent(name, kind, "no time was left of --minutes")
    compiles = getattr(function, "network" if DEVICE == "cuda" else "compiles", False)
    if quick and compiles:
        absent(name, kind, "compiling takes longer than --quick allows")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    inputs = case.make(DEVICE, dtype, False)
    prepared = replayable if DEVICE == "cuda" else repeatable
    try:
        wrong = verdict_on_ours(case, dtype, inputs)
        if kind != "ours":
            check(case, kind, function, checked_inputs(case, dtype, inputs))
        elif wrong is not None:
            raise wrong
        run, calls = prepared(case, function, inputs)
        memory, kernels = peak_bytes(case, function, inputs), launches(case, function, inputs)
        beside = prepared(case, ours(case, "fused"), inputs) if kind != "ours" and wrong is None else None
    except AssertionError as error:
        ROWS.append(Row(name, kind, absent=f"FAILED, so not timed: {str(error).splitlines()[0]}"))
        raise
    except (NotTimed, RuntimeError, ImportError) as error:
        reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        if kind == "ours":
            ROWS.append(Row(name, kind, absent=f"FAILED, so not timed: {reason}"))
            raise
        absent(name, kind, f"cannot run this here: {reason}")

    before_each_round: list[float] = []  # seconds of a call of ours

    def turn() -> None:
        begin = time.perf_counter()
        beside[0]()
        before_each_round.append((time.perf_counter() - begin) / beside[1])

    begin = time.perf_counter()
    run()
    rounds = number_of_rounds(time.perf_counter() - begin, quick)
    benchmark.pedantic(run, rounds=rounds, **({} if beside is None else {"setup": turn}))

    times = benchmark.stats.stats
    seconds = times.median / calls
    row = Row(
        name, kind, seconds=seconds, spread=times.iqr / times.median, rounds=rounds, peak_bytes=memory,
        launches=kernels, target_us=case.target_us, wanted_factor=case.factors.get(kind),
        wanted_share=case.share, wanted_peak=case.peak, wanted_launches=case.launches,
        shape=next((list(value.shape) for value in inputs.values() if isinstance(value, torch.Tensor)), None),
    )  # fmt: skip
    row.rates(number(case.bytes), number(case.flops), case.images, best)
    if beside is not None:
        pairs = zip(times.data, before_each_round, strict=False)
        row.ours_is_faster = statistics.median(theirs / calls / mine for theirs, mine in pairs)
    ROWS.append(row)
    benchmark.extra_info.update(row.to_json() | {"ceilings": best})


def number_of_rounds(seconds: float, quick: bool) -> int:
    """As many as fit into a second (--quick) or four, 30 at most, 10 with --quick; 3 at least."""
    return max(3, min(10 if quick else 30, int((1 if quick else 4) / max(seconds, 1e-9))))


def number(value) -> int:
    return value() if callable(value) else value
