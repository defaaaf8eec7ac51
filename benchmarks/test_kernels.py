"""Time every case of cases.py against its rivals on this GPU; on a machine without one, say so and skip.

    pytest benchmarks/test_kernels.py --benchmark-json=benchmarks/results/<gpu>.json
    pytest benchmarks/test_kernels.py -k "norm and ours"

An implementation that disagrees with the reference in float64 is not timed: it fails.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason='pytest-benchmark is not installed: pip install -e ".[bench]"')

from cases import CASES
from clock import NotTimed, check, copy_ceiling, ours, replayable
from conftest import ROWS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are timed on a CUDA device")

IMPLEMENTATIONS = [(name, kind) for name, case in CASES.items() for kind in ("ours", *case.rivals)]


@pytest.fixture(scope="session")
def ceiling() -> float:
    return copy_ceiling()


@pytest.mark.parametrize("name, kind", IMPLEMENTATIONS)
def test_time(name, kind, benchmark, ceiling):
    case = CASES[name]
    function = ours(case, "fused") if kind == "ours" else case.rivals[kind]
    if isinstance(function, str):
        pytest.skip(function)
    inputs = case.make("cuda", torch.bfloat16, False)
    try:
        check(case, kind, function, inputs)
        run, calls = replayable(case, function, inputs)
    except (NotTimed, RuntimeError) as error:
        if kind == "ours":
            raise
        pytest.skip(f"{kind} cannot run this: {str(error).splitlines()[0]}")
    benchmark.pedantic(run, rounds=30, warmup_rounds=3)

    seconds = benchmark.stats.stats.median / calls
    rate, flops = case.bytes / seconds, case.flops / seconds
    ROWS.append((name, kind, seconds * 1e6, rate, rate / ceiling, flops))
    benchmark.extra_info.update(
        case=name, implementation=kind, us_per_call=seconds * 1e6, calls=calls, bytes=case.bytes,
        bytes_per_second=rate, share_of_copy=rate / ceiling, copy_bytes_per_second=ceiling,
        flops_per_second=flops, target_us=case.target_us, wanted_factor=case.factors.get(kind),
        gpu=torch.cuda.get_device_name(), torch=torch.__version__,
    )  # fmt: skip
