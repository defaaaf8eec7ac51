"""Paths and options of the benchmarks, what the machine is, and the table at the end of a run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]


@dataclass
class Row:
    """One implementation of one case. absent: why it was not timed."""

    case: str
    implementation: str
    absent: str | None = None
    seconds: float = 0.0
    spread: float = 0.0  # interquartile range over median
    rounds: int = 0
    peak_bytes: int | None = None
    bytes_per_second: float = 0.0
    flops_per_second: float = 0.0
    share_of_best: float = 0.0  # of the copy or the matrix product of this run, whichever is nearer
    target_us: float | None = None
    wanted_factor: float | None = None  # how many times faster than this rival we want to be
    shape: list[int] | None = None  # of the first input

    def to_json(self) -> dict:
        return asdict(self)


ROWS: list[Row] = []


def pytest_addoption(parser):
    group = parser.getgroup("dalle2_fast")
    group.addoption("--quick", action="store_true", help="few rounds: every row once, under 8 minutes")
    group.addoption("--threads", type=int, help="of a CPU; default: torch's own choice")


def pytest_configure(config):
    if threads := config.getoption("threads", None):
        if threads < 1:
            raise pytest.UsageError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    from timing import machine, versions

    machine_info["dalle2_fast"] = machine() | {
        "versions": versions("triton", "open_clip_torch", "inf-cl", "liger-kernel", "apex", "diffusers"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver_and_clocks": _nvidia_smi(),
    }


def _nvidia_smi() -> dict | None:
    names = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit"]
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(names, map(str.strip, done.stdout.split(",")), strict=False))


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("dalle2_fast")
    heads = ("case", "implementation", "us", "+-", "GB/s", "TFLOP/s", "of best", "peak MB", "ours is")
    line = "{:<47}{:<25}{:>11}{:>6}{:>8}{:>9}{:>9}{:>9}{:>9}"
    terminalreporter.write_line(line.format(*heads))
    ours = {row.case: row.seconds for row in ROWS if row.implementation == "ours" and row.seconds}
    for row in ROWS:
        if row.absent:
            terminalreporter.write_line(f"{row.case:<47}{row.implementation:<25}absent: {row.absent}")
            continue
        ratio = row.seconds / ours[row.case] if row.case in ours else None
        terminalreporter.write_line(
            line.format(
                row.case, row.implementation, f"{row.seconds * 1e6:.1f}", f"{row.spread:.0%}",
                f"{row.bytes_per_second / 1e9:.0f}", f"{row.flops_per_second / 1e12:.3g}",
                f"{row.share_of_best:.0%}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
                "" if ratio is None or row.implementation == "ours" else f"{ratio:.2f}x",
            )
        )  # fmt: skip
