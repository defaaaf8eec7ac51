"""Where the time of the rows goes that fell short of a goal: kernels of one call, longest first.

    python -m benchmarks.timing.profile_rows RUN.json [--cases NAME ...] [--output DIR]

RUN.json: of pytest benchmarks/ --benchmark-json, or a file of results/. For every case of which a goal is not
met (or those of --cases) DIR/<case>.txt gets torch's profile of ours, and DIR/<case>.json its trace. What is
then changed, with what was predicted and what came, is a line of results/tuning.md.
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
    """Names of cases, without repetition."""
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
    """The table; the trace goes beside it."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--cases", nargs="+", help="names, whatever their goals")
    parser.add_argument("--output", type=Path, default=Path("profiles"), help="default: %(default)s")
    arguments = parser.parse_args()
    cases = registry.load()
    try:
        names = arguments.cases or short_of_a_goal(arguments.run)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{arguments.run}: {type(error).__name__}: {error}")
    if strangers := [name for name in names if name not in cases]:
        parser.error(f"expected cases of the registry, got {', '.join(strangers)}")
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
