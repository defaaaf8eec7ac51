"""How long the command line takes to answer: `--help` of every command, and a caption with an unknown word.

    python benchmarks/jobs/start_up.py --out benchmarks/results/start_up.json

CPU seconds of a process, user and system, medians of 5 runs, beyond those of `python -c pass`: a busy machine
changes them less than wall-clock seconds. Each output is checked before its time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from dalle2_fast.cli import COMMANDS

UNKNOWN = ["generate", "a blurple circle"]
RUNS = 5


def cpu_seconds(words: list[str], code: int, says: str) -> float:
    """CPU seconds of one process of Python; RuntimeError if it ends or answers otherwise."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code or says not in done.stdout + done.stderr:
        raise RuntimeError(f"{words}: exit code {done.returncode}: {done.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def median(words: list[str], code: int = 0, says: str = "") -> float:
    return statistics.median(cpu_seconds(words, code, says) for _ in range(RUNS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    out = parser.parse_args().out
    python = median(["-c", "pass"])
    command = ["-m", "dalle2_fast"]
    helps = {name: median([*command, name, "--help"], says="usage: ") - python for name in COMMANDS}
    error = median([*command, *UNKNOWN], 2, "nearest: purple") - python
    result = {
        "unit": "CPU seconds beyond python -c pass, medians of 5",
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "python_itself": round(python, 3),
        "help": {name: round(seconds, 3) for name, seconds in helps.items()},
        "unknown_word": round(error, 3),
    }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
