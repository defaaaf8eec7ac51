"""How one row of a session is measured: `session` runs this in a process that it can replace."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from unittest import mock

import torch

from benchmarks.cases import registry
from benchmarks.timing.agreement import check, ours
from benchmarks.timing.clock import ceilings, cpu_round, gpu_round, kernel_count, peak_bytes
from benchmarks.timing.rows import Row, number

MODULES = tuple(module for module in registry.MODULES if module != "cpu")
# Without a GPU these rivals cannot run; the tests call them with stand-ins for their packages.
NEED_CUDA = ("sdpa cudnn", "sdpa efficient", "liger", "liger, Hopper", "apex", "sglang", "vllm-omni",
             "inf_cl")  # fmt: skip


class RowTimer:
    """Times rows one after the other: on a GPU, or in a dry run at tiny sizes on the CPU.

    What ours needs for a case is built once and serves the rivals that follow: `ours_is_faster` compares each
    round of a rival with a round of ours just before it.
    """

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run
        self.device, self.dtype = ("cpu", torch.float32) if dry_run else ("cuda", torch.bfloat16)
        self.best = ceilings(self.device)
        self.case: registry.Case | None = None
        self.verdicts: dict[str, Exception | None] = {}  # case -> why ours failed the check

    def time(self, name: str, kind: str) -> Row:
        """The measured row, or an absent one with the reason; nothing is raised."""
        case = registry.CASES[name]
        if reason := self.why_absent(case, kind):
            return Row(name, kind, absent=reason)
        try:
            self._select(case)
            return self._timed(kind, self._function(kind))
        except Exception as error:  # a rival may raise anything
            text = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
            rival = kind != "ours" and not isinstance(error, AssertionError)
            what = "cannot run this here" if rival and not self.dry_run else "FAILED, so not timed"
            return Row(name, kind, absent=f"{what}: {text}")

    def warm(self, name: str, kind: str) -> None:
        """Call an implementation once, so that what it compiles is in the caches on the disk."""
        if self.why_absent(registry.CASES[name], kind) is None:
            self._select(registry.CASES[name])
            self._function(kind)(**self.inputs)

    def why_absent(self, case: registry.Case, kind: str) -> str | None:
        if case.package is not None and not registry.installed(case.package):
            return f"{case.package} is not installed"
        if kind != "ours" and isinstance(case.rivals[kind], str):
            return case.rivals[kind]
        return "needs a CUDA device" if self.dry_run and kind in NEED_CUDA else None

    def _function(self, kind: str) -> Callable:
        return ours(self.case, "fused") if kind == "ours" else self.case.rivals[kind]

    def _select(self, case: registry.Case) -> None:
        """Make the inputs of a case and check ours, unless the row before was of the same case."""
        if self.case is case:
            return
        self.case, self.inputs, self.checked_inputs, self.round_of_ours = case, None, None, None
        if not self.dry_run:
            gc.collect()
            torch.cuda.empty_cache()
        self.inputs = self.checked_inputs = case.make(self.device, self.dtype, self.dry_run)
        if case.make_check is not None and not self.dry_run:
            self.checked_inputs = case.make_check(self.device, self.dtype)
        if case.name not in self.verdicts:
            try:
                check(case, "ours", self._function("ours"), self.checked_inputs)
                self.verdicts[case.name] = None
            except Exception as error:  # raised in the row of ours; rivals are then timed alone
                self.verdicts[case.name] = error

    def _timed(self, kind: str, function: Callable) -> Row:
        case = self.case
        if kind != "ours":
            check(case, kind, function, self.checked_inputs)
        elif self.verdicts[case.name] is not None:
            raise self.verdicts[case.name]
        one_round = cpu_round if self.dry_run else gpu_round
        compared = self.verdicts[case.name] is None
        if compared and self.round_of_ours is None:
            self.round_of_ours = one_round(case, self._function("ours"), self.inputs)
        run, calls = self.round_of_ours if kind == "ours" else one_round(case, function, self.inputs)
        memory = None if self.dry_run else peak_bytes(case, function, self.inputs)
        kernels = None if self.dry_run else kernel_count(case, function, self.inputs)
        times, pairs = [seconds_of(run) / calls], []
        for _ in range(1 if self.dry_run else max(2, min(9, int(1 / max(calls * times[0], 1e-9))))):
            before = seconds_of(self.round_of_ours[0]) / self.round_of_ours[1] if compared else None
            times.append(seconds_of(run) / calls)
            pairs += [times[-1] / before] if compared else []
        quarters = statistics.quantiles(times, n=4)
        row = Row.of(
            case, kind, self.inputs, seconds=statistics.median(times), rounds=len(times), peak_bytes=memory,
            spread=(quarters[2] - quarters[0]) / statistics.median(times), launches=kernels,
        )  # fmt: skip
        # Those of a dry run would be of other sizes; to count the operations of a network takes seconds.
        moved, flops = (0, 0) if self.dry_run else (number(case.bytes), number(case.flops))
        row.set_rates(moved, flops, case.images, self.best)
        row.ours_is_faster = statistics.median(pairs) if pairs and kind != "ours" else None
        return row


def seconds_of(run: Callable) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def is_broken(dry_run: bool) -> bool:
    """Whether this process can use the GPU no more: after an illegal memory access every call fails."""
    if dry_run:
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def serve(pipe: Connection, dry_run: bool) -> None:
    """Answer (method of RowTimer, case, kind) with (Row, whether this process is broken), until None comes.

    The first message to the other side is the ceilings of the device.
    """
    registry.load(MODULES)
    registry.QUICK = True
    torch.set_num_threads(1 if dry_run else torch.get_num_threads())
    # A dry run does not compile: that would take minutes.
    compiler = (lambda function, **_: function) if dry_run else torch.compile
    with mock.patch.object(torch, "compile", compiler):
        timer = RowTimer(dry_run)
        pipe.send(timer.best)
        for method, name, kind in iter(pipe.recv, None):
            pipe.send((getattr(timer, method)(name, kind), is_broken(dry_run)))
