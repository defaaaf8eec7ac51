"""Time the rows of some stages, each stage within its seconds, and write every row as soon as it is measured.

    python -m benchmarks.jobs.session OUT.jsonl [STAGE:SECONDS ...] [--dry-run] [--compile-ahead]

Stages, in the order of their value: "jobs" (whole runs, networks, training steps, patched U-Nets), "ops" (the
kernels that changed since they were last measured) and "losses". Rows that compile a network come last within
their stage. A row that hangs is stopped alone: another process measures the rows, and is replaced then. OUT
gets one line of JSON for the machine and one per row; `benchmarks.timing.report` reads it. Rows without a
figure say why. The exit status is 1 if a row that could run failed.

--dry-run runs every row at a tiny size on the CPU, without torch.compile and without limits for a row; its
figures mean nothing. --compile-ahead calls what compiles in the stages once and writes nothing: run it where
time is left over, to fill the compilers' caches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.cases import registry
from benchmarks.conftest import RIVALS
from benchmarks.jobs.session_rows import MODULES, serve
from benchmarks.timing.provenance import commit, machine, versions
from benchmarks.timing.rows import Row

STAGES = {
    "jobs": (
        "caption to 256 px, 4 images", "decoder forward, batch 2", "decoder training step, batch 8",
        "patched stable diffusion 1.5, forward, batch 2", "patched karlo decoder, forward, batch 2",
        "patched kandinsky 2.2, forward, batch 2", "upsampler forward, batch 1", "prior forward, batch 2",
        "clip training step, batch 64", "patched stable diffusion 1.5, loss and gradient, batch 8",
    ),
    "ops": (
        "norm silu forward channels_last", "norms of the decoder, batch 2", "unclip attention, batch 2",
        "unclip attention, batch 64", "cross-attention forward and backward",
        "norm silu forward, one sample", "norm silu forward, one sample, channels_last",
        "norm film silu forward", "diffusion step, decoder, batch 4, wall",
    ),
    "losses": (
        "sigmoid loss, N = 32768, D = 512", "soft contrastive loss, N = 16384, D = 512",
        "contrastive loss, N = 4096, D = 512", "contrastive loss, N = 8192, D = 512",
        "contrastive loss, N = 16384, D = 512", "contrastive loss, N = 32768, D = 512",
        "contrastive loss, N = 65536, D = 512", "contrastive loss, N = 131072, D = 512",
    ),
}  # fmt: skip
SECONDS = {"jobs": 240, "ops": 80, "losses": 60}
# The most that one row may take. torch.compile needs about a minute for a U-Net of Karlo's size.
ROW_SECONDS, COMPILED_ROW_SECONDS = 45, 110


class Worker:
    """The process that measures. It is started when it is needed, and replaced when it hangs or ends."""

    def __init__(self, dry_run: bool):
        self.dry_run, self.process, self.best = dry_run, None, None

    def ask(self, method: str, name: str, kind: str, deadline: float) -> Row | None:
        """The answer of a method of RowTimer; a row that says why there is none by the deadline."""
        begin = time.monotonic()
        try:
            if self.process is None:
                self._start()
                self.best = self._answer(deadline)
            self.pipe.send((method, name, kind))
            row, broken = self._answer(deadline)
        except TimeoutError:
            self.stop()
            why = f"was stopped after {time.monotonic() - begin:.0f} s"
            return Row(name, kind, absent=f"FAILED, so not timed: it {why}" if kind == "ours" else why)
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
            self.stop()
            return Row(name, kind, absent=f"FAILED, so not timed: its process ended with {how}")
        if broken:
            self.stop()
        return row

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork could not use the GPU
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.dry_run))
        self.process.start()
        theirs.close()  # so that the end of the process is seen as the end of the pipe

    def _answer(self, deadline: float):
        if not self.pipe.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        return self.pipe.recv()

    def stop(self, patience: float = 0.0) -> None:
        """End the process, by force if it does not end within `patience` seconds."""
        if self.process is None:
            return
        if patience:
            self.pipe.send(None)
            self.process.join(patience)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process = None


def rows_of(stage: str, dry_run: bool) -> list[tuple[str, str, bool]]:
    """(case, implementation, whether it compiles) of a stage in the order in which they are measured."""
    found = []
    for name in STAGES[stage]:
        found.append((name, "ours", False))
        for kind, rival in registry.CASES[name].rivals.items():
            found.append((name, kind, bool(getattr(rival, "compiles", False))))
    return found if dry_run else sorted(found, key=lambda row: row[2])


def header() -> dict:
    try:
        at = commit()
    except (OSError, subprocess.CalledProcessError):  # a copy of the sources without git
        at = "unknown"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    note = "The compilers ran in their default mode, without max-autotune."
    about = machine() | dict(versions=versions(*RIVALS), gpu=gpu, note=note)
    return dict(machine=about, commit=at, datetime=time.strftime("%Y-%m-%dT%H:%M:%S"))


def run(output: Path, stages: dict[str, float], dry_run: bool) -> int:
    """Measure the stages; the number of rows that failed."""
    worker, failed = Worker(dry_run), 0
    try:
        with output.open("a") as file:

            def write(line: dict) -> None:
                file.write(json.dumps(line) + "\n")
                file.flush()

            write(header())
            for stage, seconds in stages.items():
                end = time.monotonic() + seconds
                for name, kind, compiles in rows_of(stage, dry_run):
                    now = time.monotonic()
                    row = Row(name, kind, absent=f"no time was left of the {seconds:.0f} s of the stage")
                    if now < end:
                        most = COMPILED_ROW_SECONDS if compiles else ROW_SECONDS
                        row = worker.ask("time", name, kind, end if dry_run else min(end, now + most))
                    failed += (row.absent or "").startswith("FAILED")
                    write(row.to_json() | dict(stage=stage, ceilings=worker.best))
                    figure = row.absent or f"{row.seconds * 1e6:.1f} us"
                    print(f"{time.monotonic() - now:5.1f} s: {name} / {kind}: {figure}", flush=True)
    finally:
        worker.stop(patience=5)
    return failed


def compile_ahead(stages: dict[str, float], dry_run: bool) -> None:
    worker = Worker(dry_run)
    try:
        for stage, seconds in stages.items():
            end = time.monotonic() + seconds
            for name, kind, compiles in rows_of(stage, dry_run):
                if compiles and time.monotonic() < end:
                    worker.ask("warm", name, kind, end)
    finally:
        worker.stop(patience=5)


def stage_and_seconds(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition(":")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(STAGES)}, got {name}")
    try:
        return name, float(seconds or SECONDS[name])
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected STAGE:SECONDS, got {text}") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.session", description=__doc__.splitlines()[0]
    )
    parser.add_argument("output", type=Path, metavar="OUT.jsonl")
    parser.add_argument("stages", nargs="*", type=stage_and_seconds, metavar="STAGE:SECONDS",
                        help=f"default: {' '.join(f'{name}:{most}' for name, most in SECONDS.items())}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--compile-ahead", action="store_true", help="only fill the compilers' caches")
    args = parser.parse_args(arguments)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # of the processes that measure: they run the kernels' launchers
    elif not torch.cuda.is_available():
        parser.error("expected a CUDA device, or --dry-run")
    registry.load(MODULES)
    stages = dict(args.stages or SECONDS)
    if args.compile_ahead:
        compile_ahead(stages, args.dry_run)
        return 0
    return 1 if run(args.output, stages, args.dry_run) else 0


if __name__ == "__main__":
    sys.exit(main())
