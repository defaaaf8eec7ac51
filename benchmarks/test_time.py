"""Time every case of the registry and its rivals on this device.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.timing.report run.json
    pytest benchmarks/ --benchmark-only --quick                     # every row once, 8 minutes at most
    pytest benchmarks/ --benchmark-only --threads 2 -k "norm and ours"

An implementation that disagrees with the reference in float64 fails and is not timed. A rival that is not
installed or cannot run is listed as absent, with the reason. Ours runs before every round of a rival, so that
other load on the machine affects both. Without a GPU only the rows of a CPU are timed; the others are listed
as needing one.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason='pytest-benchmark is not installed: pip install -e ".[bench]"')

from benchmarks.cases import registry
from benchmarks.timing.agreement import check, ours
from benchmarks.timing.clock import NotTimed, ceilings, cpu_round, gpu_round, kernel_count, peak_bytes
from benchmarks.timing.rows import ROWS, Row, number

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CASES = registry.load()
IMPLEMENTATIONS = [(name, kind) for name, case in CASES.items() for kind in ("ours", *case.rivals)]
START = time.monotonic()
VERDICTS: dict[str, Exception | None] = {}  # case -> why ours failed the check, None where it passed


@pytest.fixture(scope="session")
def best() -> dict[str, float]:
    return ceilings(DEVICE)


@pytest.fixture(autouse=True)
def freed_memory():
    """Each row begins without the GPU memory of the row before."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("name, kind", IMPLEMENTATIONS)
def test_time(name, kind, benchmark, best, request):
    case = CASES[name]
    quick, minutes = request.config.getoption("quick"), request.config.getoption("minutes")
    function = implementation(case, kind, quick, 60 * (minutes or (8 if quick else float("inf"))))
    inputs = case.make(DEVICE, DTYPE, False)
    one_round = gpu_round if DEVICE == "cuda" else cpu_round
    try:
        error_of_ours = check_of_ours(case, inputs)
        if kind != "ours":
            check(case, kind, function, inputs_of_check(case, inputs))
        elif error_of_ours is not None:
            raise error_of_ours
        run, calls = one_round(case, function, inputs)
        memory, kernels = peak_bytes(case, function, inputs), kernel_count(case, function, inputs)
        compared = kind != "ours" and error_of_ours is None
        ours_run, ours_calls = one_round(case, ours(case, "fused"), inputs) if compared else (None, 1)
    except AssertionError as error:
        ROWS.append(Row(name, kind, absent=f"FAILED, so not timed: {str(error).splitlines()[0]}"))
        raise
    except (NotTimed, RuntimeError, ImportError) as error:
        reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        if kind == "ours":
            ROWS.append(Row(name, kind, absent=f"FAILED, so not timed: {reason}"))
            raise
        absent(name, kind, f"cannot run this here: {reason}")

    seconds_of_ours: list[float] = []  # per call, before each round of the rival

    def time_ours() -> None:
        begin = time.perf_counter()
        ours_run()
        seconds_of_ours.append((time.perf_counter() - begin) / ours_calls)

    begin = time.perf_counter()
    run()
    rounds = number_of_rounds(time.perf_counter() - begin, quick)
    benchmark.pedantic(run, rounds=rounds, **({"setup": time_ours} if compared else {}))

    times = benchmark.stats.stats
    row = Row.of(
        case, kind, inputs, seconds=times.median / calls, spread=times.iqr / times.median, rounds=rounds,
        peak_bytes=memory, launches=kernels,
    )  # fmt: skip
    row.set_rates(number(case.bytes), number(case.flops), case.images, best)
    if compared:
        pairs = zip(times.data, seconds_of_ours, strict=False)
        row.ours_is_faster = statistics.median(theirs / calls / mine for theirs, mine in pairs)
    ROWS.append(row)
    benchmark.extra_info.update(row.to_json() | {"ceilings": best})


def implementation(case: registry.Case, kind: str, quick: bool, seconds: float) -> Callable:
    """The function to time. Skips the test, with an absent row, where there is none or no time for it."""
    if case.device != DEVICE:
        if kind == "ours":
            needed = "a CUDA device" if DEVICE == "cpu" else "a machine without a CUDA device"
            ROWS.append(Row(case.name, kind, absent=f"needs {needed}"))
        pytest.skip(f"is timed on {case.device}")
    if case.package is not None and not registry.installed(case.package):
        absent(case.name, kind, f"{case.package} is not installed")
    function = ours(case, "fused") if kind == "ours" else case.rivals[kind]
    if isinstance(function, str):
        absent(case.name, kind, function)
    if time.monotonic() - START > seconds:
        absent(case.name, kind, "no time was left of --minutes")
    if quick and getattr(function, "network" if DEVICE == "cuda" else "compiles", False):
        absent(case.name, kind, "compiling takes longer than --quick allows")
    return function


def absent(name: str, kind: str, reason: str):
    ROWS.append(Row(name, kind, absent=reason))
    pytest.skip(reason)


def inputs_of_check(case: registry.Case, inputs):
    return inputs if case.make_check is None else case.make_check(case.device, DTYPE)


def check_of_ours(case: registry.Case, inputs) -> Exception | None:
    """Why ours failed the check, which runs once per case; None if it passed."""
    if case.name not in VERDICTS:
        try:
            check(case, "ours", ours(case, "fused"), inputs_of_check(case, inputs))
            VERDICTS[case.name] = None
        except (AssertionError, RuntimeError) as error:
            VERDICTS[case.name] = error
    return VERDICTS[case.name]


def number_of_rounds(seconds: float, quick: bool) -> int:
    """As many rounds as fit into 4 seconds, 3 to 30; with --quick into 1 second, 3 to 10."""
    return max(3, min(10 if quick else 30, int((1 if quick else 4) / max(seconds, 1e-9))))

