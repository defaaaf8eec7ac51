"""Profile the rows that missed a goal: the kernels of a call, longest first.

    python -m benchmarks.timing.profile_rows RUN [--cases NAME ... | --first NAME ...] [--output DIR]

RUN is a file of pytest benchmarks/ --benchmark-json, of jobs.session or of results/. For every case that
missed a goal (after those of --first, or only those of --cases), torch's profile of ours is written to
DIR/<case>.txt and its trace to DIR/<case>.json. A change that follows from it is a line in results/tuning.md,
with the predicted and the measured time. --dry-run profiles two of them at a tiny size on the CPU.
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
from benchmarks.timing.rows import Row, read_run


def short_of_a_goal(path: Path) -> list[str]:
    """Names of the cases with a goal that was missed, each once."""
    content = {} if path.suffix == ".jsonl" else json.loads(path.read_text())
    rows = content["rows"] if "rows" in content else read_run(path)["rows"]
    known = Row.__dataclass_fields__
    found = []
    for row in rows:
        row = Row(**{name: value for name, value in row.items() if name in known})
        if not all(met for _, met in row.goals()) and row.case not in found:
            found.append(row.case)
    return found


def profile(case: registry.Case, stem: Path, dry_run: bool = False) -> str:
    """Write the table and the trace to files with this stem, and return the table."""
    on_gpu = case.device == "cuda" and not dry_run
    dtype = torch.bfloat16 if on_gpu else torch.float32
    inputs = case.make("cuda" if on_gpu else "cpu", dtype, dry_run)
    job = timed_job(case, ours(case, "auto" if dry_run else "fused"), *prepare(case, inputs))
    rounds = 1 if case.calls == 1 or dry_run else 10
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
    parser.add_argument("--first", nargs="+", default=[], help="the same, before those that missed a goal")
    parser.add_argument("--output", type=Path, default=Path("profiles"), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="tiny inputs on the CPU")
    arguments = parser.parse_args()
    cases = registry.load()
    try:
        names = arguments.cases or list(dict.fromkeys([*arguments.first, *short_of_a_goal(arguments.run)]))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{arguments.run}: {type(error).__name__}: {error}")
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"expected cases of the registry, got {', '.join(unknown)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in names[:2] if arguments.dry_run else names:
        if cases[name].device == "cuda" and not torch.cuda.is_available() and not arguments.dry_run:
            print(f"{name}: needs a CUDA device", file=sys.stderr)
            continue
        stem = arguments.output / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        print(profile(cases[name], stem, arguments.dry_run), flush=True)
    if not names:
        print("every goal is met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
