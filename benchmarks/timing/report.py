"""From runs of the benchmarks to results that can be read, compared and kept.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.timing.report run.json [session.jsonl ...]
    python -m benchmarks.timing.report --compare OLD.json NEW.json

The first form writes benchmarks/results/<device>.json, .md and plots, and two summaries. Rows of a later run
replace those of an earlier one. In docs/measured.md, the text between the markers `<!-- benchmarks:begin -->`
and `<!-- benchmarks:end -->` is replaced by a summary of all files in results/ that this program wrote; in
the README by that of the GPUs. The second form exits with status 1 if a row became slower by more than its
spread. The plots need matplotlib (extra "bench").
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

from benchmarks.timing.markdown import summary, table
from benchmarks.timing.plots import plot, plot_memory
from benchmarks.timing.provenance import RESULTS, ROOT, write
from benchmarks.timing.rows import Row, read_run

FORMAT = 2
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def read_runs(paths: list[Path]) -> dict:
    """Files of runs -> device, date, commit, machine, runs, ceilings, rows, absent."""
    rows, absent, runs, result = {}, {}, [], {}
    for path in paths:
        run = read_run(path)
        machine = run["machine"]
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
        device = machine["gpu"] or f"{machine['cpu']}, {threads}"
        if result and result["device"] != device:
            raise ValueError(f"{path}: expected a run on {result['device']}, got one on {device}")
        runs.append({"date": run["datetime"], "commit": run["commit"][:10], **machine})
        result = {
            "format": FORMAT,
            "device": device,
            "date": run["datetime"][:10],
            "commit": run["commit"][:10] + (" with local changes" if run["dirty"] else ""),
            "machine": machine,
            "runs": runs,  # they may differ in versions; each ratio comes from one run
        }
        for row in map(dict, run["rows"]):
            result["ceilings"] = row.pop("ceilings")
            key = row["case"], row["implementation"]
            rows[key] = row
            absent.pop(key, None)
        for row in run["absent"]:
            key = row["case"], row["implementation"]
            if key not in rows:
                absent[key] = row["absent"]
    cases = list(dict.fromkeys(case for case, kind in sorted(rows, key=lambda key: key[1] != "ours")))
    rows = dict(sorted(rows.items(), key=lambda item: (cases.index(item[0][0]), item[0][1] != "ours")))
    for row in rows.values():
        row["goals"] = [list(goal) for goal in Row(**row).goals()]
    missing = [{"case": case, "implementation": kind, "why": why} for (case, kind), why in absent.items()]
    return result | {"rows": list(rows.values()), "absent": missing}


def write_summary(path: Path, folder: Path, *, gpus_only: bool) -> None:
    """Replace the text between the markers. ValueError if they are missing."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: expected the markers {BEGIN} and {END}, once each and in this order")
    results = []
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        if isinstance(result, dict) and result.get("format") == FORMAT:
            if not gpus_only or result["machine"]["gpu"]:
                results.append((file.stem, result))
    before, rest = text.split(BEGIN)
    shown = summary(results, os.path.relpath(folder, path.parent))
    write(path, f"{before}{BEGIN}\n{shown}{END}{rest.split(END)[1]}")


def compare(old: dict, new: dict) -> list[str]:
    """One line per row of `old` that is slower in `new` by more than both spreads together, or missing there.
    """
    if old["device"] != new["device"]:
        raise ValueError(f"--compare: expected one device, got {old['device']} and {new['device']}")
    now = {(row["case"], row["implementation"]): row for row in new["rows"]}
    slower = []
    for before in old["rows"]:
        key = before["case"], before["implementation"]
        if key not in now:
            slower.append(f"{' / '.join(key)}: missing")
            continue
        factor = now[key]["seconds"] / before["seconds"]
        allowed = 1 + before["spread"] + now[key]["spread"]
        if factor > allowed:
            slower.append(f"{' / '.join(key)}: {factor:.2f}x as long (spread allows {allowed:.2f}x)")
    return slower


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="*", type=Path,
                        help="files of pytest benchmarks/ --benchmark-json, or of jobs.session")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="files in results/")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="another file with the two markers")
    args = parser.parse_args(arguments)
    if bool(args.runs) == bool(args.compare):
        parser.error("expected files of runs, or --compare OLD NEW")
    try:
        if args.compare:
            slower = compare(*(json.loads(path.read_text()) for path in args.compare))
            print("\n".join(slower) or "no row became slower by more than its spread")
            return 1 if slower else 0
        result = read_runs(args.runs)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{type(error).__name__}: {error}")
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    plots = []
    if not args.no_plots:
        try:
            plots = plot(result, stem)
            plots += plot_memory(args.output / "contrastive_memory.json")
        except ImportError:
            print('no plots: matplotlib is not installed (pip install -e ".[bench]")', file=sys.stderr)
    result["plots"] = [path.stem.removeprefix(f"{stem.name}-") for path in plots if stem.name in path.name]
    written = [stem.with_suffix(".json"), stem.with_suffix(".md"), *plots]
    write(written[0], json.dumps(result, indent=1) + "\n")
    write(written[1], table(result))
    summaries = {} if args.summary is None else {args.summary: False}
    if args.output == RESULTS:
        summaries |= {ROOT / "docs" / "measured.md": False, ROOT / "README.md": True}
    for path, gpus_only in summaries.items():
        try:
            write_summary(path, args.output, gpus_only=gpus_only)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        written.append(path)
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
