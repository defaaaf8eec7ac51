"""The processes of one training, as `torchrun` starts them, and how they agree.

They meet at every step: all use the clock of the first one, all stop at the same step, and an error on one of
them ends all of them with its message, which the first one shows. Two process groups carry this: the one of
torch.distributed's default, for gradients, and one of gloo on the host, for everything that is decided there.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle2_fast.losses.collectives import gather
from dalle2_fast.training.errors import TrainingError

TIMEOUT = 1800.0  # seconds; also the validation by the first process has to end within this time
GRACE = 1.0  # seconds in which a process looks for the reason that another one left before it went
ATTEMPT = ".attempt"  # file in the folder of a run, see `mark_as_begun`
SPEAKS = "speaks"  # key of the store: the first process is about to show an error
FAILURE = "failure"  # key of the store: the first error of a process


class SharedError(TrainingError):
    """An error of one process that all of them know."""


class Processes:
    """The processes of a training, seen from one of them.

    Args:
        rank: of this process.
        world_size: number of processes; 1 needs no process group.
        control: process group on the host, for decisions.
        store: keys and values that all processes see.
        writers: process group on the host, for states that are written while the training goes on.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        control: dist.ProcessGroup | None = None,
        store: dist.Store | None = None,
        writers: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.control, self.store, self.writers = control, store, writers

    @property
    def is_first(self) -> bool:
        """Whether this process speaks, validates, logs and writes."""
        return self.rank == 0

    def tick(self, stops: list[int]) -> tuple[float, int | None]:
        """The clock of the first process in seconds, and the number of a signal that any process received."""
        here = [time.monotonic(), float(stops[0] if stops else 0)]
        if self.world_size == 1:
            return here[0], stops[0] if stops else None
        every = [torch.empty(2, dtype=torch.float64) for _ in range(self.world_size)]
        dist.all_gather(every, torch.tensor(here, dtype=torch.float64), group=self.control)
        signals = [int(each[1]) for each in every if each[1]]
        return every[0][0].item(), signals[0] if signals else None

    def from_first(self, value: Any) -> Any:
        """`value` of the first process, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes in the order of the batch: [n, ...] -> [N, ...]."""
        return rows if self.world_size == 1 else gather(rows)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes of a scalar on their device."""
        if self.world_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.world_size

    @torch.no_grad()
    def share(self, module: torch.nn.Module) -> None:
        """Give every process the weights and buffers of the first one."""
        if self.world_size > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, src=0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that succeeds on all processes or on none: an error on one is raised on every one.

        Raises:
            TrainingError: another process has failed, whose error the message has. The processes that failed
                raise their own errors.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if self.world_size == 1:
                raise
            error = raised
        if self.world_size == 1:
            return
        every: list[str | None] = [None] * self.world_size
        dist.all_gather_object(every, None if error is None else describe(error), group=self.control)
        if error is not None and not any(every[: self.rank]):
            raise error
        failed = [(rank, text) for rank, text in enumerate(every) if text is not None]
        if failed:
            rank, text = failed[0]
            raise SharedError(f"process {rank}: {text}")

    def agree(self, facts: dict[str, str]) -> None:
        """Raise on every process if the facts of one differ from those of the first.

        Raises:
            TrainingError: it names the process, the fact, and both values.
        """
        if self.world_size == 1:
            return
        every: list[dict[str, str]] = [{}] * self.world_size
        dist.all_gather_object(every, facts, group=self.control)
        for rank, other in enumerate(every):
            for name in [*every[0], *(name for name in other if name not in every[0])]:
                expected, got = every[0].get(name, "nothing"), other.get(name, "nothing")
                if expected != got:
                    raise SharedError(
                        f"process {rank}: {name}: expected {expected}, as process 0 has it, got {got}; start "
                        "every process with the same command and code"
                    )

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """A block in which an error on one process becomes an error on every one, also between collectives.

        A process that is killed breaks its connections. The others see it in their next collective.

        Raises:
            TrainingError: another process has failed or ended.
        """
        try:
            yield
        except Exception as error:
            if self.world_size == 1:
                raise
            raise self._cause(error) from error

    def let_the_first_speak(self) -> None:
        """Wait a little for the first process, which torchrun terminates as soon as another one has ended."""
        try:
            if self.is_first:
                self.store.set(SPEAKS, "now")
                return
            end = time.monotonic() + GRACE
            while time.monotonic() < end and not self.store.check([SPEAKS]):
                time.sleep(0.05)
            time.sleep(0.1)
        except Exception:  # it has ended, and the store with it
            return

    def _cause(self, error: Exception) -> Exception:
        """The error itself if it began here; else that of the process where it began."""
        if isinstance(error, SharedError):
            return error
        if not is_of_a_connection(error):
            text = f"process {self.rank}: {describe(error)}"
            with suppress(Exception):  # the process that has the store may have ended
                self.store.compare_set(FAILURE, "", text)  # unless another one was the first to fail
            return error
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            try:
                if self.store.check([FAILURE]):
                    return TrainingError(self.store.get(FAILURE).decode())
            except Exception:  # the process that has the store has ended
                break
            time.sleep(0.1)
        return TrainingError(
            "another process was killed or does not answer (its host, or torchrun's report, says which); all "
            "processes have stopped. Start again with --resume to continue from the last state"
        )


ALONE = Processes()


def describe(error: Exception) -> str:
    """An error as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (TrainingError, ValueError, OSError)):
        return text
    return f"{type(error).__name__}: {text}"[:400]


def is_of_a_connection(error: Exception) -> bool:
    """Whether an error says that another process has gone, not that something is wrong here."""
    if isinstance(error, (TrainingError, ValueError, TypeError, OSError)):
        return isinstance(error, ConnectionError)
    text = str(error).lower()
    kinds = (dist.DistError,) if hasattr(dist, "DistError") else ()
    signs = ("gloo", "nccl", "connection", "timed out", "broken pipe", "socket")
    return isinstance(error, kinds) or any(sign in text for sign in signs)


def check_division(name: str, rows: int, processes: Processes, accumulate: int = 1) -> None:
    """Raise unless processes and micro-batches divide the rows of a batch.

    Args:
        name: of the stage.
        rows: of the batch: scenes, or pairs.
        processes: of the training.
        accumulate: number of micro-batches of a process.

    Raises:
        TrainingError: they do not.

    Example:
        >>> check_division("prior", 64, ALONE, accumulate=4)
    """
    if rows % (processes.world_size * accumulate):
        got = f"{processes.world_size} process{'es' * (processes.world_size > 1)}"
        got += f" x --accumulate {accumulate}" if accumulate > 1 else ""
        raise TrainingError(
            f"{name}: expected a number of processes that divides the {rows} rows of a batch, got {got}; "
            "give another --batch-size or another number of processes"
        )


def world_size() -> int:
    """The number of processes that the environment (`torchrun`) announces; 1 without one.

    Raises:
        ValueError: WORLD_SIZE is no number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"WORLD_SIZE: expected an integer >= 1, got {text!r}")
    return int(text)


@contextmanager
def joined(device: torch.device, *, timeout: float = TIMEOUT) -> Iterator[Processes]:
    """Within the block this process belongs to those that `torchrun` started with it.

    Args:
        device: where this process trains; it chooses the backend, nccl or gloo.
        timeout: seconds that a process waits for the others.

    Raises:
        TrainingError: the others did not come.
    """
    if world_size() == 1:
        yield ALONE
        return
    wait = timedelta(seconds=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may be that of the last one
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"group {attempt}", store), rank=rank, world_size=size, timeout=wait,
        )  # fmt: skip
        groups = [dist.new_group(backend="gloo", timeout=wait) for _ in range(2)]
    except (RuntimeError, ValueError, OSError) as error:
        raise TrainingError(f"torchrun: the processes did not meet: {describe(error)}") from error
    processes = Processes(rank, size, groups[0], dist.PrefixStore(f"training {attempt}", store), groups[1])
    failed = True
    try:
        yield processes
        failed = False
    finally:
        if failed:  # the groups may wait for a process that has gone: they end with this one
            processes.let_the_first_speak()
        else:
            dist.destroy_process_group()


def is_restarted(processes: Processes, out: Path) -> bool:
    """Whether `torchrun` has started these processes again after an attempt that had begun to train.

    `torchrun --max-restarts` starts all processes again if one ends, also after a command that was refused.
    An attempt that trains leaves the name of its torchrun in the folder of the run, see `mark_as_begun`.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    mark = out / ATTEMPT
    return processes.from_first(processes.is_first and mark.exists() and mark.read_text() == agent_name())


def mark_as_begun(processes: Processes, out: Path) -> None:
    """Let the processes of a later attempt of this `torchrun` know that this one began to train.

    Raises:
        OSError: the folder cannot be written.
    """
    if processes.is_first and "TORCHELASTIC_RUN_ID" in os.environ:
        (out / ATTEMPT).write_text(agent_name())


def agent_name() -> str:
    """The torchrun that started this process; it stays the same when it starts processes again."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {socket.gethostname()} {os.getppid()}"


@contextmanager
def silent_unless(speaks: bool) -> Iterator[None]:
    """Within the block a process that does not speak prints nothing to standard output."""
    if speaks:
        yield
        return
    before = sys.stdout
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        try:
            yield
        finally:
            sys.stdout = before
