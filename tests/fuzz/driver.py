"""Drawn calls in child processes: a crash or a hang counts as a fault of the call that was running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # of the processor for one call; the slowest takes a few
WAIT = 3600  # seconds until a call that does not compute counts as hung; a process may be paused meanwhile


def run(numbers: Iterable[int], workers: int = 1) -> dict[int, tuple[str, str, str | None]]:
    """number of the call -> (op, "valid" or "invalid", fault or None)."""
    numbers = list(numbers)
    shares = [numbers[start::workers] for start in range(workers)]
    found: dict[int, tuple[str, str, str | None]] = {}
    with ThreadPoolExecutor(workers) as pool:
        for part in pool.map(lambda share: dict(_run_share(share)), shares):
            found |= part
    return dict(sorted(found.items()))


def _run_share(numbers: list[int]) -> Iterator[tuple[int, tuple[str, str, str | None]]]:
    while numbers:
        done = 0
        for number, outcome in _child(numbers):
            yield number, outcome
            done += 1
        if done == len(numbers):
            return
        # The child has ended before its time: the call that it did not report is what ended it.
        yield numbers[done], ("?", "valid", "the process crashed or hung")
        numbers = numbers[done + 1 :]


def _child(numbers: list[int]) -> Iterator[tuple[int, tuple[str, str, str | None]]]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.fuzz.driver"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    with process:
        process.stdin.write(json.dumps(numbers))
        process.stdin.close()
        for line in process.stdout:
            number, *outcome = json.loads(line)
            yield number, tuple(outcome)  # type: ignore[misc]


def _work() -> None:
    import signal
    import warnings

    import torch

    from tests.fuzz.judge import judge

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number in json.load(sys.stdin):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # either ends the process
        signal.alarm(WAIT)
        print(json.dumps([number, *judge(number)]), flush=True)


if __name__ == "__main__":
    _work()
