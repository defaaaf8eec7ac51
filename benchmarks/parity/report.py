"""Our networks against those whose weights they load: the largest relative difference of their outputs.

    python -m benchmarks.parity.report            writes benchmarks/results/parity.json and parity.md

Both have the same random weights, in float32 on the CPU. Karlo is scaled down (karlo.py); the CLIPs have the
published widths (clip.py). The parameter counts are those of the published size, counted on the meta device.
A source that is not installed is named, and its rows stay as they were measured last. The status is 1, and
nothing is written, if a difference is larger than its bound.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from dataclasses import asdict

from benchmarks.parity.clip import clip_rows
from benchmarks.parity.karlo import karlo_rows
from benchmarks.parity.rows import measure
from benchmarks.timing.provenance import RESULTS, write


def table(rows: list[dict]) -> str:
    lines = [
        "# Parity",
        "",
        "Outputs of our networks compared with those of the source. Both have the same random weights, in",
        "float32 on the CPU. `max relative difference` is the norm of the difference over the norm of the",
        "source's output, `largest element` the largest element of the difference over the largest of the",
        "source; each is the worst over all outputs and random inputs. Karlo is scaled down. CLIP ViT-B-32",
        "and RN50 are complete; the other CLIPs have the published widths and heads, but 2 blocks per",
        "Transformer and 1 per stage of a ResNet. The parameter counts are those of the published size.",
        "Written by `python -m benchmarks.parity.report`.",
        "",
        "| network | source | parameters | max relative difference | largest element | bound | measured |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        needed = {name: v for name, v in row["versions"].items() if name != "python"}
        measured = ", ".join([row["date"], row["commit"], *(f"{name} {v}" for name, v in needed.items())])
        numbers = f"{row['relative_difference']:.1e} | {row['largest_element']:.1e} | {row['bound']:.0e}"
        lines.append(
            f"| {row['network']} | {row['source']} | {row['parameters']:,} | {numbers} | {measured} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="text in the network or source of a row")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # UnCLIPPipeline will be removed
    path, kept = RESULTS / "parity.json", {}
    if path.is_file():
        old = json.loads(path.read_text())["rows"]
        kept = {(row["network"], row["source"]): row for row in old}
    rows, failed = [], []
    for row in [*karlo_rows(), *clip_rows()]:
        key = (row.network, row.source)
        absent = [name for name in row.needs if importlib.util.find_spec(name) is None]
        chosen = arguments.only in row.network or arguments.only in row.source
        if absent or not chosen:
            if absent:
                last = f"kept from {kept[key]['date']}" if key in kept else "left out"
                print(f"{row.network}, {row.source}: {', '.join(absent)} not installed, {last}")
            rows += [kept[key]] if key in kept else []
            continue
        made = asdict(measure(row))
        print(f"{row.network}, {row.source}: {made['relative_difference']:.1e} (bound {row.bound:.0e})")
        if not made["relative_difference"] <= row.bound:
            failed.append(row.network)
        rows.append(made)
    if failed:
        print(f"larger than the bound, nothing is written: {', '.join(failed)}", file=sys.stderr)
        return 1
    write(path, json.dumps({"rows": rows}, indent=2) + "\n")
    write(path.with_suffix(".md"), table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
