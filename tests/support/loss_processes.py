"""Runs a function in W processes connected by gloo, and collects what each returns or raises.

The processes come from multiprocessing's fork server, which imports torch once: starting one costs about as
much as a fork, and no thread or autograd state of the test session is inherited.
"""

from __future__ import annotations

import datetime
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dalle2_fast.ops import _dispatch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed", "dalle2_fast.losses", "tests.support.losses.distributed_cases"]
)


def run(
    function: Callable, world_size: int, folder: Path, *arguments, seconds: float = 60, limit: float = 300
) -> list:
    """[function(rank, world_size, *arguments) of rank 0, of rank 1, ...]; an error is returned as its text.

    seconds: the timeout of the process group. A process that still runs after `limit` seconds is killed, and
    the test fails.
    """
    processes = [
        _context.Process(target=_process, args=(function, rank, world_size, str(folder), seconds, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hung, f"ranks {hung} of {world_size} still ran after {limit} s"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _process(function, rank, world_size, folder, seconds, arguments) -> None:
    torch.set_num_threads(1)
    _dispatch._INTERPRETED = False  # as in tests/conftest.py, whose environment this process has
    store = dist.FileStore(f"{folder}/meet", world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=seconds)
    )
    # A process that dies as soon as it is connected would make the others fail while they still connect.
    store.set(f"joined/{rank}", "")
    store.wait([f"joined/{other}" for other in range(world_size)])
    try:
        result = function(rank, world_size, *arguments)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        result = f"{type(error).__name__}: {error}"
    torch.save(result, f"{folder}/{rank}.pt")
    if not isinstance(result, str):  # after an error the others may wait for this process: it ends at once
        dist.barrier()
        dist.destroy_process_group()
