"""From runs of the benchmarks to results that can be read, compared and kept.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.report run.json [more.json ...]     # results/<device>.json, .md and plots
    python -m benchmarks.report --compare OLD.json NEW.json  # status 1 if a row fell by more than its spread

Rows of a later run replace those of an earlier one. The plots need matplotlib (the extra "bench").
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 1


def read_runs(paths: list[Path]) -> dict:
    """pytest-benchmark's JSON files -> {"device", "date", "commit", "machine", "ceilings", "rows"}."""
    rows, result = {}, {}
    for path in paths:
        run = json.loads(path.read_text())
        if "benchmarks" not in run or "dalle2_fast" not in run.get("machine_info", {}):
            raise ValueError(f"{path}: expected a file of pytest benchmarks/ --benchmark-json, got another")
        machine = run["machine_info"]["dalle2_fast"]
        device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
        if result and result["device"] != device:
            raise ValueError(f"{path}: expected a run on {result['device']}, got one on {device}")
        commit = run["commit_info"]
        result = {
            "format": FORMAT,
            "device": device,
            "date": run["datetime"][:10],
            "commit": commit["id"][:10] + (" with local changes" if commit["dirty"] else ""),
            "machine": machine,
        }
        for benchmark in run["benchmarks"]:
            row = dict(benchmark["extra_info"])
            result["ceilings"] = row.pop("ceilings")
            rows[row["case"], row["implementation"]] = row
    ours = {case: row for (case, kind), row in rows.items() if kind == "ours"}
    for (case, kind), row in rows.items():
        row["ours_is_faster"] = row["seconds"] / ours[case]["seconds"] if case in ours else None
        row["reached"] = reached(row, kind)
    return result | {"rows": list(rows.values())}


def reached(row: dict, kind: str) -> bool | None:
    """Whether the goal of a row is met; None where it has none."""
    if kind == "ours":
        return None if row["target_us"] is None else row["seconds"] * 1e6 <= row["target_us"]
    if row["wanted_factor"] is None or row["ours_is_faster"] is None:
        return None
    return row["ours_is_faster"] >= row["wanted_factor"]


def table(result: dict) -> str:
    """Markdown. Where we lose is printed like where we win."""
    best = result["ceilings"]
    lines = [
        f"# {result['device']}, {result['date']}, commit {result['commit']}",
        "",
        f"Measured in the same run: copy {best['bytes_per_second'] / 1e9:.0f} GB/s, matrix product "
        f"{best['flops_per_second'] / 1e12:.3g} TFLOP/s. `of best`: of whichever of the two is nearer.",
        "",
        "| case | implementation | us | +- | GB/s | TFLOP/s | of best | peak MB | ours is faster | wanted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ours = row["implementation"] == "ours"
        wanted = row["target_us"] if ours else row["wanted_factor"]
        cells = (
            row["case"],
            f"**{row['implementation']}**" if ours else row["implementation"],
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['spread']:.0%}",
            f"{row['bytes_per_second'] / 1e9:.0f}",
            f"{row['flops_per_second'] / 1e12:.3g}" if row["flops_per_second"] else "",
            f"{row['share_of_best']:.0%}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            "" if ours or row["ours_is_faster"] is None else f"{row['ours_is_faster']:.2f}x",
            "" if wanted is None else (f"{wanted:g} us" if ours else f"{wanted:g}x")
            + {True: " yes", False: " **no**", None: ""}[row["reached"]],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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


def plot(result: dict, stem: Path) -> list[Path]:
    """Bars (how much faster ours is than each rival), the roofline, and the losses' time and memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def save(figure: Figure, name: str) -> Path:
        FigureCanvasAgg(figure)
        path = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(path, dpi=120, bbox_inches="tight")
        return path

    paths = []
    rivals = [row for row in result["rows"] if row["ours_is_faster"] and row["implementation"] != "ours"]
    if rivals:
        figure = Figure(figsize=(9, 1 + 0.28 * len(rivals)))
        axes = figure.add_subplot()
        names = [f"{row['case']} / {row['implementation']}" for row in rivals]
        values = [row["ours_is_faster"] for row in rivals]
        axes.barh(names, values, color=["#2a7" if value >= 1 else "#c44" for value in values])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set(xlabel="times faster than the rival", title=result["device"])
        paths.append(save(figure, "rivals"))

    ours = [row for row in result["rows"] if row["implementation"] == "ours" and row["flops_per_second"]]
    if ours:
        figure = Figure(figsize=(7, 5))
        axes, best = figure.add_subplot(), result["ceilings"]
        intensity = [row["flops_per_second"] / row["bytes_per_second"] for row in ours]
        ends = [min(intensity) / 4, max(intensity) * 4]
        roof = [min(best["flops_per_second"], best["bytes_per_second"] * end) / 1e12 for end in ends]
        corner = best["flops_per_second"] / best["bytes_per_second"]
        if ends[0] < corner < ends[1]:
            ends, roof = [ends[0], corner, ends[1]], [roof[0], best["flops_per_second"] / 1e12, roof[1]]
        axes.plot(ends, roof, color="black", label="measured ceilings")
        for x, row in zip(intensity, ours, strict=True):
            axes.plot(x, row["flops_per_second"] / 1e12, "o")
            axes.annotate(row["case"], (x, row["flops_per_second"] / 1e12), fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s",
                 title=result["device"])  # fmt: skip
        axes.legend()
        paths.append(save(figure, "roofline"))

    sized = [(int(found[1]), row) for row in result["rows"]
             if (found := re.match(r"contrastive loss, N = (\d+), D = 512", row["case"]))]  # fmt: skip
    if len({n for n, _ in sized}) > 1:
        figure = Figure(figsize=(10, 4))
        for place, (key, label, unit) in enumerate(
            (("seconds", "seconds", 1.0), ("peak_bytes", "peak memory, GB", 1e9)), 1
        ):
            axes = figure.add_subplot(1, 2, place)
            for kind in dict.fromkeys(row["implementation"] for _, row in sized):
                points = sorted((n, row[key] / unit) for n, row in sized
                                if row["implementation"] == kind and row[key] is not None)  # fmt: skip
                axes.plot(*zip(*points, strict=True), "o-", label=kind) if points else None
            axes.set(xscale="log", yscale="log", xlabel="N", ylabel=label)
            axes.legend(fontsize=7)
        paths.append(save(figure, "loss"))
    return paths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="files of pytest benchmarks/ --benchmark-json")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="files of results/")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--no-plots", action="store_true")
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
    written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    written[0].write_text(json.dumps(result, indent=1) + "\n")
    written[1].write_text(table(result))
    if not args.no_plots:
        try:
            written += plot(result, stem)
        except ImportError:
            print('no plots: matplotlib is not installed (pip install -e ".[bench]")', file=sys.stderr)
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
