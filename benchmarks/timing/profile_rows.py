"""Profile the rows that missed a goal: the kernels of a call, longest first.

    python -m benchmarks.timing.profile_rows RUN.json [--cases NAME ...] [--output DIR]

RUN.json is a file of pytest benchmarks/ --benchmark-json or of results/. For every case that missed a goal
(or those of --cases), torch's profile of ours is written to DIR/<case>.txt and its trace to DIR/<case>.json.
A change that follows from it is a line in results/tuning.md, with the predicted and the measured time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch

from benchmarks.cases import registry
from benchmarks.timing.agreement import ours, prepare
from benchmarks.timing.clock import timed_job
from benchmarks.timing.rows import Row


def short_of_a_goal(path: Path) -> list[str]:
    """Names of the cases with a goal that was missed, each once."""
    content = json.loads(path.read_text())
    rows = content["rows"] if "rows" in content else [one["extra_info"] for one in content["benchmarks"]]
    known = Row.__dataclass_fields__
    found = []
    for row in rows:
        row = Row(**{name: value for name, value in row.items() if name in known})
        if not all(met for _, met in row.goals()) and row.case not in found:
            found.append(row.case)
    return found


def profile(case: registry.Case, stem: Path, rounds: int = 10) -> str:
    """Write the table and the trace to files with this stem, and return the table."""
    on_gpu = case.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    inputs = case.make(case.device, dtype, False)
    job = timed_job(case, ours(case, "fused"), *prepare(case, inputs))
    rounds = 1 if case.calls == 1 else rounds
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    for _ in range(2):
        job()
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(rounds):
            job()
        if on_gpu:
            torch.cuda.synchronize()
    found.export_chrome_trace(str(stem.with_suffix(".json")))
    order = f"self_{'cuda' if on_gpu else 'cpu'}_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=80)
    text = f"{case.name}: {rounds} calls\n{table}\n"
    stem.with_suffix(".txt").write_text(text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing.profile_rows", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--cases", nargs="+", help="names of cases to profile, regardless of their goals")
    parser.add_argument("--output", type=Path, default=Path("profiles"), help="default: %(default)s")
    arguments = parser.parse_args()
    cases = registry.load()
    try:
        names = arguments.cases or short_of_a_goal(arguments.run)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{arguments.run}: {type(error).__name__}: {error}")
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"expected cases of the registry, got {', '.join(unknown)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        if cases[name].device == "cuda" and not torch.cuda.is_available():
            print(f"{name}: needs a CUDA device", file=sys.stderr)
            continue
        stem = arguments.output / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        print(profile(cases[name], stem))
    if not names:
        print("every goal is met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
