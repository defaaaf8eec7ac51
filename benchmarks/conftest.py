"""Paths for the benchmarks, and their table at the end of a run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

ROWS: list[tuple] = []  # (case, implementation, us, bytes per second, share of the copy's, FLOP per second)


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("kernels")
    heads = ("case", "implementation", "us", "GB/s", "of copy", "TFLOP/s")
    terminalreporter.write_line("{:<46}{:<17}{:>9}{:>8}{:>9}{:>9}".format(*heads))
    for case, name, us, rate, share, flops in ROWS:
        terminalreporter.write_line(
            f"{case:<46}{name:<17}{us:>9.1f}{rate / 1e9:>8.0f}{share:>9.0%}{flops / 1e12:>9.0f}"
        )
