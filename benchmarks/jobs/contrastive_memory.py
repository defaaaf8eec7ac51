"""Peak memory and time of the contrastive losses, forward and backward, and of open_clip's formulas on a CPU.

    python -m benchmarks.jobs.contrastive_memory [--sizes 4096 8192 16384] [--threads 1 2] [--rounds 3]
    python -m benchmarks.jobs.contrastive_memory --sizes 65536 131072 --skip reference open_clip --add

Every run is a separate process. It makes its features, runs a small loss to load what it needs, resets the
peak of its resident memory and then runs the loss once. The extra memory is the peak minus the resident
memory before, gradients included. In every round the implementations take turns, so that other load on the
machine affects all of them. The result, benchmarks/results/contrastive_memory.json, is written only if losses
and gradients agree. --add keeps its other rows. open_clip's formula needs about 16 N^2 bytes, ours does not.
`python -m benchmarks.timing.report` plots the curves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing.provenance import RESULTS, ROOT, commit, machine, save, versions
from dalle2_fast import functional

SCALE, BIAS = 14.3, -10.0


def clip(image, text, scale, bias):
    """What open_clip's ClipLoss computes in one process."""
    labels = torch.arange(image.shape[0])
    per_image, per_text = scale * image @ text.T, scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def siglip(image, text, scale, bias):
    """What open_clip's SigLipLoss computes in one process."""
    signs = 2 * torch.eye(image.shape[0]) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / image.shape[0]


def ours(name, impl):
    function = getattr(functional, name)
    extra = name == "sigmoid_loss"
    return lambda image, text, scale, bias: function(image, text, scale, *[bias] * extra, impl=impl)


JOBS = {
    name: {"fused": ours(name, "fused"), "reference": ours(name, "reference"), "open_clip": rival}
    for name, rival in (("contrastive_loss", clip), ("sigmoid_loss", siglip))
}


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(loss: str, implementation: str, n: int, width: int, threads: int) -> dict:
    """One run, for which `in_a_process` starts a new process."""
    torch.set_num_threads(threads)
    function = JOBS[loss][implementation]

    def inputs(rows):
        generator = torch.Generator().manual_seed(0)
        image = F.normalize(torch.randn(rows, width, generator=generator), dim=1)
        text = F.normalize(image + 0.1 * torch.randn(rows, width, generator=generator), dim=1)
        return [value.requires_grad_() for value in (image, text, torch.tensor(SCALE), torch.tensor(BIAS))]

    torch.autograd.grad(function(*(few := inputs(64))), few[:3])
    leaves = inputs(n)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = status("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    value = function(*leaves)
    gradients = torch.autograd.grad(value, leaves[:3])
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    norms = [float(gradient.norm()) for gradient in gradients]
    return seconds | {"bytes": status("VmHWM") - before, "results": [float(value), *norms]}


def in_a_process(*arguments) -> dict:
    command = [sys.executable, "-m", "benchmarks.jobs.contrastive_memory", "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def compare(loss: str, n: int, width: int, threads: int, rounds: int, skip: list[str]) -> dict:
    names = [name for name in JOBS[loss] if name not in skip]
    runs, load = {name: [] for name in names}, machine()["load_before"]
    for _ in range(rounds):
        for name in names:
            runs[name].append(in_a_process(loss, name, n, width, threads))
    for name in names:
        for actual, expected in zip(runs[name][0]["results"], runs[names[-1]][0]["results"], strict=True):
            if abs(actual - expected) > 1e-4 * abs(expected):
                raise RuntimeError(f"{loss}, {name}, N = {n}: expected {expected}, got {actual}")
    row = {"loss": loss, "N": n, "D": width, "threads": threads, "rounds": rounds}
    row |= {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "load_before": load}
    for name in names:
        row[name] = {
            "extra_MB": round(max(run["bytes"] for run in runs[name]) / 1e6, 1),
            "wall_s": round(statistics.median(run["wall_s"] for run in runs[name]), 2),
            "cpu_s": round(statistics.median(run["cpu_s"] for run in runs[name]), 2),
        }
    for name in names[1:]:
        row[f"fused_over_{name}"] = {
            "memory": round(row["fused"]["extra_MB"] / row[name]["extra_MB"], 4),
            "wall": ratio(runs["fused"], runs[name], "wall_s"),
            "cpu": ratio(runs["fused"], runs[name], "cpu_s"),
        }
    return row


def ratio(ours: list[dict], theirs: list[dict], key: str) -> float:
    """Median over rounds of the ratio of two runs, which ran one after the other."""
    return round(statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.contrastive_memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--one", nargs=5, metavar=("LOSS", "IMPLEMENTATION", "N", "D", "THREADS"),
                        help="one run in this process; prints its result")
    parser.add_argument("--losses", nargs="+", default=["contrastive_loss"], choices=list(JOBS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="+", default=[], help="implementations, e.g. those that do not fit")
    parser.add_argument("--name", default="contrastive_memory", help="of the file in benchmarks/results")
    parser.add_argument("--note", default="", help="kept in the rows, e.g. other load on the machine")
    parser.add_argument("--add", action="store_true", help="keep the file's rows of other sizes or threads")
    arguments = parser.parse_args()
    if arguments.one:
        loss, implementation, *sizes = arguments.one
        print(json.dumps(measure(loss, implementation, *map(int, sizes))))
        return
    about = {"machine": {name: machine()[name] for name in ("cpu", "cores")}, "versions": versions()}
    path, rows = RESULTS / f"{arguments.name}.json", {}
    if arguments.add and path.exists():
        before = json.loads(path.read_text())
        about = {name: before[name] for name in about}
        rows = {key_of(row): row for row in before["rows"]}
    for loss in arguments.losses:
        for threads in arguments.threads:
            for n in arguments.sizes:
                row = compare(loss, n, arguments.width, threads, arguments.rounds, arguments.skip)
                row["note"] = arguments.note
                rows[key_of(row)] = row
                print(json.dumps(row), flush=True)
                ordered = [rows[key] for key in sorted(rows)]
                save(arguments.name, {**about, "rows": ordered})  # after each row, so that none is lost
    print(path)


def key_of(row: dict) -> tuple:
    return row["loss"], row["D"], row["threads"], row["N"]


if __name__ == "__main__":
    main()
