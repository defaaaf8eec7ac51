"""Our networks beside those they load the weights of: the largest relative difference of their outputs.

    python -m benchmarks.parity.report            writes benchmarks/results/parity.json and parity.md

Both hold the same random weights, in float32 on the CPU. Karlo is scaled down (parity_karlo.py); the CLIPs
have the published widths (parity_clip.py). The parameters are those of the published size, counted on the
meta device. A source that is not installed is named, and its rows stay as they were measured last. Exits with
1 if a difference is larger than its bound.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

from benchmarks.parity.clip import clip_rows  # noqa: E402
from benchmarks.parity.karlo import karlo_rows  # noqa: E402
from benchmarks.parity.rows import measure  # noqa: E402
from benchmarks.timing.provenance import RESULTS, write  # noqa: E402


def table(rows: list[dict]) -> str:
    lines = [
        "# Parity",
        "",
        "Outputs of our networks beside those of the source, both with the same random weights, float32 on",
        "the CPU: the norm of the difference over the norm, and the largest element of the difference over",
        "the largest of the source, each the worst of all outputs and draws. Karlo is scaled down; CLIP",
        "ViT-B-32 and RN50 are whole, the other CLIPs have the published widths and heads, but 2 blocks a",
        "Transformer and 1 a stage of a ResNet. Parameters are those of the published size. Written by",
        "`python -m benchmarks.parity.report`.",
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose network or source has this")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # that diffusers will drop UnCLIPPipeline
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
