"""Runs a function in W processes that meet as those of torchrun do, over gloo.

The processes are forks of one that has imported torch and the trainer and computed nothing.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from dalle2_fast.ops import _dispatch
from dalle2_fast.training.parallel.processes import joined

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.checkpoint",
     "dalle2_fast.training.run",
     "dalle2_fast.cli.train", "dalle2_fast.losses", "tests.support.losses.distributed_cases"]
)  # fmt: skip


class Outcome:
    """What a process did: the value of its function, its exit code and what it printed."""

    def __init__(self, value=None, code: int | None = None, stdout: str = "", stderr: str = "") -> None:
        self.value, self.code, self.stdout, self.stderr = value, code, stdout, stderr


class Launch:
    """W started processes.

    Args:
        function: called as function(*arguments, processes) in each process.
        world_size: W.
        folder: for what they return.
        arguments: of the function.
        environment: variables of all processes.
        meets: join the process group here; False leaves this to the function.
    """

    def __init__(
        self, function: Callable, world_size: int, folder: Path, *arguments, environment=None, meets=True
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = (environment or {}) | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size),
        }  # fmt: skip
        self.processes = [
            context.Process(
                target=_process, args=(function, rank, str(folder), variables, arguments, meets), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, limit: float = 120) -> list[Outcome]:
        """The outcomes of all processes. One that still runs after `limit` seconds fails the test."""
        end = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
        assert not hung, f"ranks {hung} still ran after {limit} s"
        found = []
        for rank, process in enumerate(self.processes):
            path = self.folder / f"{rank}.pt"
            outcome = torch.load(path, weights_only=False) if path.exists() else Outcome()
            path.unlink(missing_ok=True)
            outcome.code = process.exitcode if outcome.code is None else outcome.code
            found.append(outcome)
        return found


def run(function: Callable, world_size: int, folder: Path, *arguments, **options) -> list:
    """function(*arguments, processes) of every rank; an error of one fails the test."""
    outcomes = Launch(function, world_size, folder, *arguments, **options).wait()
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 0, f"rank {rank} (exit code {outcome.code}):\n{outcome.stderr}"
    return [outcome.value for outcome in outcomes]


def _process(function, rank, folder, variables, arguments, meets) -> None:
    os.environ |= variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    _dispatch._INTERPRETED = False  # as in tests/conftest.py, whose environment this process has
    outcome = Outcome(code=0)
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            if meets:
                with joined(torch.device("cpu"), timeout=60) as processes:
                    outcome.value = function(*arguments, processes)
            else:
                outcome.value = function(*arguments)
                outcome.code = outcome.value
        except BaseException:
            traceback.print_exc(file=errors)
            outcome.code = 1
    outcome.stdout, outcome.stderr = output.getvalue(), errors.getvalue()
    temporary = Path(folder) / f"{rank}.writing"
    torch.save(outcome, temporary)
    os.replace(temporary, Path(folder) / f"{rank}.pt")
    sys.stdout.flush()
    os._exit(outcome.code)
