"""Run a function in a child process with bounded time and memory, and say how it ended."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SECONDS = 60
GROWTH = 1 << 30  # bytes that a child may allocate beyond what its parent has

# What the command line turns into one line and exit code 2.
USER_ERRORS = ("ValueError", "OSError", "TrainingError", "FloatingPointError")


@dataclass
class Outcome:
    """How a child ended.

    Args:
        kind: "loaded", "refused" (an error for users), or what went wrong: the name of another exception,
            "too much memory", "too slow" or "crashed".
        message: of the error, or what the function returned.
        seconds: how long it took.
        megabytes: growth of the resident memory.
        ran_code: whether code in a file was executed.
    """

    kind: str
    message: str
    seconds: float
    megabytes: int
    ran_code: bool


def run(function: Callable[[], str], sentinel: Path) -> Outcome:
    """function() in a forked child; sentinel: a file that exists afterwards if code was executed."""
    reader, writer = os.pipe()
    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        child = os.fork()
    if child == 0:
        os.close(reader)
        _child(function, writer, sentinel)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - begin
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        kind = "too slow" if number == signal.SIGALRM else "crashed"
        return Outcome(kind, f"signal {number}", seconds, 0, sentinel.exists())
    kind, message, grown = json.loads(said)
    return Outcome(kind, message, seconds, grown >> 20, sentinel.exists())


def _child(function: Callable[[], str], writer: int, sentinel: Path) -> None:
    os.environ["DALLE2_FAST_SENTINEL"] = str(sentinel)
    torch.set_num_threads(1)  # the threads of the parent do not exist in the child
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + GROWTH, used + GROWTH))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    try:
        kind, message = "loaded", function()
    except MemoryError:
        kind, message = "too much memory", traceback.format_exc(limit=-3)
    except BaseException as error:
        families = {family.__name__ for family in type(error).__mro__}
        kind = "refused" if families & set(USER_ERRORS) else type(error).__name__
        message = str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    with os.fdopen(writer, "w") as pipe:
        pipe.write(json.dumps([kind, message[:2000], grown]))
    os._exit(0)
