"""Training throughput and curves from the logs of one or more runs -> benchmarks/results/training-NAME.json.

    python -m benchmarks.jobs.training_summary NAME STAGE=LOG.jsonl [STAGE=LOG.jsonl ...] [--note TEXT]

A stage that was trained in several phases is named once for each phase, in order. Images per second are the
median over the windows of the log. The curve has about ten points per log, and the last one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.timing.provenance import machine, save, versions


def summary(log: Path) -> dict:
    """Steps, minutes, images, median images/s, the loss curve and the last metrics of one log."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    if not rows:
        raise SystemExit(f"{log}: expected lines of a training log, got none")
    logged_always = {"step", "seconds", "samples", "images_per_s", "loss", "grad_norm", "lr"}
    windows = [row for row in rows if "loss" in row]
    curve = windows[:: max(1, len(windows) // 10)] + windows[-1:]
    return {
        "steps": rows[-1]["step"],
        "minutes": round(rows[-1]["seconds"] / 60, 1),
        "images": rows[-1]["samples"],
        "images_per_s": statistics.median(row["images_per_s"] for row in windows),
        "loss": [[row["samples"], round(row["loss"], 4)] for row in curve],
        "metrics": {key: value for key, value in rows[-1].items() if key not in logged_always},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.training_summary", description=__doc__.splitlines()[0]
    )
    parser.add_argument("name")
    parser.add_argument("logs", nargs="+", metavar="STAGE=LOG.jsonl")
    parser.add_argument("--note", default="", help="kept in the result, e.g. other load on the machine")
    parser.add_argument("--trained-on", metavar="DEVICE", help="default: this machine's CPU")
    arguments = parser.parse_args()
    stages: dict[str, list[dict]] = {}
    for item in arguments.logs:
        stage, _, log = item.partition("=")
        stages.setdefault(stage, []).append(summary(Path(log)))
    if arguments.trained_on is not None:
        about = {"machine": {"device": arguments.trained_on}}
    else:
        here = machine()
        about = {"machine": {"cpu": here["cpu"], "cores": here["cores"]}, "versions": versions()}
    about["note"] = arguments.note
    print(save(f"training-{arguments.name}", {**about, "stages": stages}))


if __name__ == "__main__":
    main()
