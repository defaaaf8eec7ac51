"""From runs of the benchmarks to results that can be read, compared and kept.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.timing.report run.json [more.json ...]  # results/<device>.json, .md, plots; README
    python -m benchmarks.timing.report --compare OLD.json NEW.json  # status 1 if a row fell beyond its spread

Rows of a later run replace those of an earlier one. In the README, what stands between the markers
`<!-- benchmarks:begin -->` and `<!-- benchmarks:end -->` is written anew from all files of results/ that this
program wrote. The plots need matplotlib (the extra "bench").
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

from benchmarks.timing.plots import plot, plot_memory  # noqa: E402
from benchmarks.timing.provenance import RESULTS, write  # noqa: E402
from benchmarks.timing.rows import Row  # noqa: E402

FORMAT = 2
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def read_runs(paths: list[Path]) -> dict:
    """pytest-benchmark's JSON files -> device, date, commit, machine, runs, ceilings, rows, absent."""
    rows, absent, runs, result = {}, {}, [], {}
    for path in paths:
        run = json.loads(path.read_text())
        if "benchmarks" not in run or "dalle2_fast" not in run.get("machine_info", {}):
            raise ValueError(f"{path}: expected a file of pytest benchmarks/ --benchmark-json, got another")
        machine = run["machine_info"]["dalle2_fast"]
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
        device = machine["gpu"] or f"{machine['cpu']}, {threads}"
        if result and result["device"] != device:
            raise ValueError(f"{path}: expected a run on {result['device']}, got one on {device}")
        commit = run["commit_info"]
        runs.append({"date": run["datetime"], "commit": commit["id"][:10], **machine})
        result = {
            "format": FORMAT,
            "device": device,
            "date": run["datetime"][:10],
            "commit": commit["id"][:10] + (" with local changes" if commit["dirty"] else ""),
            "machine": machine,
            "runs": runs,  # with other versions, say; a ratio is always of one run
        }
        for benchmark in run["benchmarks"]:
            row = dict(benchmark["extra_info"])
            result["ceilings"] = row.pop("ceilings")
            key = row["case"], row["implementation"]
            rows[key] = row
            absent.pop(key, None)
        for row in run.get("dalle2_fast_absent", []):
            key = row["case"], row["implementation"]
            if key not in rows:
                absent[key] = row["absent"]
    cases = list(dict.fromkeys(case for case, kind in sorted(rows, key=lambda key: key[1] != "ours")))
    rows = dict(sorted(rows.items(), key=lambda item: (cases.index(item[0][0]), item[0][1] != "ours")))
    for row in rows.values():
        row["goals"] = [list(goal) for goal in Row(**row).goals()]
    missing = [{"case": case, "implementation": kind, "why": why} for (case, kind), why in absent.items()]
    return result | {"rows": list(rows.values()), "absent": missing}


def table(result: dict) -> str:
    """Markdown. Where we lose is printed like where we win."""
    heads = ("case", "implementation", "us", "+-", "GB/s", "GFLOP/s", "images/s", "of best", "peak MB",
             "ours is", "wanted")  # fmt: skip
    lines = [
        f"# {title(result)}",
        "",
        f"{about(result)} `of best`: of whichever of the two is nearer. `ours is`: how many times faster "
        "than this rival, the median over rounds before each of which ours ran.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for row in result["rows"]:
        ours = row["implementation"] == "ours"
        goals = ", ".join(f"{wanted} {'yes' if met else '**no**'}" for wanted, met in row["goals"])
        cells = (
            row["case"],
            f"**{row['implementation']}**" if ours else row["implementation"],
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['spread']:.0%}",
            f"{row['bytes_per_second'] / 1e9:.0f}",
            f"{row['flops_per_second'] / 1e9:.0f}" if row["flops_per_second"] else "",
            f"{row['images_per_second']:.3g}" if row["images_per_second"] else "",
            f"{row['share_of_best']:.0%}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            "" if row["ours_is_faster"] is None else f"{row['ours_is_faster']:.2f}x",
            goals,
        )
        lines.append(f"| {' | '.join(cells)} |")
    if result["absent"]:
        lines += ["", "Not timed:", ""]
        reasons: dict[str, list[str]] = {}
        for row in result["absent"]:
            reasons.setdefault(row["why"], []).append(f"{row['case']} / {row['implementation']}")
        lines += [f"- {why}: {'; '.join(names)}" for why, names in reasons.items()]
    return "\n".join(lines) + "\n"


def title(result: dict) -> str:
    return f"{result['device']}, {result['date']}, commit {result['commit']}"


def about(result: dict) -> str:
    best, note = result["ceilings"], result["machine"].get("note")
    text = (
        f"Measured in the same run: copy {best['bytes_per_second'] / 1e9:.0f} GB/s, matrix product "
        f"{best['flops_per_second'] / 1e9:.0f} GFLOP/s."
    )
    return f"{text} {note.rstrip('.')}." if note else text


def summary(results: list[tuple[str, dict]], folder: str) -> str:
    """For the README: of each device a line for every case, ours beside every rival. folder: of the results,
    as the README names it."""
    lines = []
    for name, result in results:
        lines += [
            f"**{title(result)}.** {about(result)} All rows: `{folder}/{name}.md`.",
            "",
            "| case | ours, ms | images/s | time of rivals / ours, side by side |",
            "|---|---|---|---|",
        ]
        for row in result["rows"]:
            if row["implementation"] != "ours":
                continue
            rivals = [other for other in result["rows"]
                      if other["case"] == row["case"] and other["ours_is_faster"] is not None]  # fmt: skip
            versus = ", ".join(f"{one['implementation']} {one['ours_is_faster']:.2f}" for one in rivals)
            rate = f"{row['images_per_second']:.3g}" if row["images_per_second"] else ""
            lines.append(f"| {row['case']} | {milliseconds(row['seconds'])} | {rate} | {versus} |")
        lines.append("")
        pictures = [f"[{kind}]({folder}/{name}-{kind}.png)" for kind in result["plots"]]
        if pictures:
            lines += [f"Plots: {', '.join(pictures)}.", ""]
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """Three digits, and never a power of ten."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def write_readme(path: Path, folder: Path) -> None:
    """Replaces what stands between the markers. ValueError where they are not there."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: expected the markers {BEGIN} and {END}, once each and in this order")
    results = []
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        if isinstance(result, dict) and result.get("format") == FORMAT:
            results.append((file.stem, result))
    before, rest = text.split(BEGIN)
    shown = summary(results, os.path.relpath(folder, path.parent))
    write(path, f"{before}{BEGIN}\n{shown}{END}{rest.split(END)[1]}")


def compare(old: dict, new: dict) -> list[str]:
    """One line for each row of `new` that is slower than in `old` by more than both spreads together, and for
    each that is no longer there."""
    if old["device"] != new["device"]:
        raise ValueError(f"--compare: expected one device, got {old['device']} and {new['device']}")
    now = {(row["case"], row["implementation"]): row for row in new["rows"]}
    fallen = []
    for before in old["rows"]:
        key = before["case"], before["implementation"]
        if key not in now:
            fallen.append(f"{' / '.join(key)}: no longer there")
            continue
        factor = now[key]["seconds"] / before["seconds"]
        allowed = 1 + before["spread"] + now[key]["spread"]
        if factor > allowed:
            fallen.append(f"{' / '.join(key)}: {factor:.2f}x as long (spread allows {allowed:.2f}x)")
    return fallen


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="*", type=Path, help="files of pytest benchmarks/ --benchmark-json")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="files of results/")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="default: the project's, unless --output")
    args = parser.parse_args(arguments)
    if bool(args.runs) == bool(args.compare):
        parser.error("expected files of runs, or --compare OLD NEW")
    try:
        if args.compare:
            fallen = compare(*(json.loads(path.read_text()) for path in args.compare))
            print("\n".join(fallen) or "no row fell by more than its spread")
            return 1 if fallen else 0
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
    readme = args.readme or (ROOT / "README.md" if args.output == RESULTS else None)
    if readme is not None:
        try:
            write_readme(readme, args.output)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        written.append(readme)
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
