"""An error of one process ends all of them: one line by the first, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from dalle2_fast.cli import main
from dalle2_fast.training.folder import StageFolder
from dalle2_fast.training.run_folder.lock import run_lock
from tests.training.parallel.workers import Launch


def command(words: list[str], others: list[str], fault: str) -> int:
    """The command line on every process: more words on those after the first, a fault on the last."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if fault == "full disk" and rank == count - 1:
        flush, calls = os.fsync, []

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) > 1:  # the state of step 0 is written
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return flush(descriptor)

        os.fsync = full
    return main(words + (others if rank else []))


def launch(tmp_path, *words, others=(), fault="", stage="clip", count=2) -> Launch:
    words = ["train", stage, "--preset", "tiny", "--out", str(tmp_path / "run"), "--device", "cpu",
             "--quiet", *words]  # fmt: skip
    return Launch(command, count, tmp_path / "results", words, list(others), fault, meets=False)


def assert_refused(started: Launch, *parts: str) -> None:
    outcomes = started.wait(limit=60)
    assert [outcome.code for outcome in outcomes] == [2] * len(outcomes), outcomes[0].stderr
    line, *more = outcomes[0].stderr.splitlines()
    assert line.startswith("dalle2-fast: ") and not more
    assert all(part in line for part in parts), line
    assert not any(outcome.stderr or outcome.stdout for outcome in outcomes[1:])


def test_a_number_of_processes_that_does_not_divide_the_batch(tmp_path):
    """Catches: a batch that is rounded, or a line by every process."""
    started = launch(tmp_path, "--batch-size", "5")
    assert_refused(started, "clip: expected a number of processes that divides the 5 rows", "got 2 processes")
    assert not (tmp_path / "run").exists()


def test_another_command_on_one_process(tmp_path):
    """Catches: processes that train different things together."""
    started = launch(tmp_path, "--lr", "0.01", others=["--lr", "0.02"])
    assert_refused(started, "process 1: --lr: expected 0.01, as process 0 has it, got 0.02")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_which_another_command_trains(tmp_path):
    """Catches: a lock that only one of the processes respects."""
    with run_lock(tmp_path / "run"):
        assert_refused(launch(tmp_path), "another command", "is training in")


def test_a_full_disk_on_one_process(tmp_path):
    """Catches: half of a state under the name of a whole one, and a message without the process."""
    started = launch(tmp_path, "--steps", "2000", "--save-steps", "2", fault="full disk")
    assert_refused(started, "cannot write", "checkpoints/step-000000002: process 1: No space left on device")
    folder = StageFolder(tmp_path / "run" / "clip")
    assert [path.name for path in folder.checkpoints()] == ["step-000000000"]
    assert not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, 2)])
def test_a_signal_to_one_process_stops_all(tmp_path, number, code):
    """Catches: processes that stop at different steps, or that wait for one that was killed."""
    started = launch(tmp_path, "--steps", "100000", "--save-steps", "1000000")
    log, end = tmp_path / "run" / "clip" / "log.jsonl", time.monotonic() + 60
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(started.processes[1].pid, number)
    first, second = started.wait(limit=60)
    assert first.code == code, first.stderr
    newest = StageFolder(Path(tmp_path) / "run" / "clip").checkpoints()[0]
    if number == signal.SIGTERM:
        assert second.code == code and newest.name > "step-000000000"
        assert first.stdout == (
            "clip: interrupted by SIGTERM; the state is saved, continue with --resume\n"
        )
    else:
        assert first.stderr.startswith("dalle2-fast: another process was killed or does not answer")
    assert not second.stdout
