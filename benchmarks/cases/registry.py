"""What is timed: one registry of cases. Adding a row is adding a Case in one of the files beside this one.

A case makes a set of inputs, runs ours on it, and names rivals that compute the same. Rivals of packages that
are not installed are listed as absent, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

Inputs = Mapping[str, object]  # tensors, None, and for whole networks the nn.Module


@dataclass(frozen=True)
class Case:
    """A row of the table: one shape of an op, a network or a job.

    make(device, dtype, tiny) -> inputs, seeded. Tiny ones are for a check on the CPU.
    ours(impl, **inputs) -> tensor or tensors; with impl="reference" and float64 inputs it is the truth.
    rivals: name -> function of the inputs, or text saying why there is none here.
    bytes: the least that has to move (every input read once, every output written once); flops: what the
        matrix units have to do. Numbers, or functions that find them when they are needed.
    images: how many one call makes or learns from; 0: the row has no images per second.
    package: what has to be installed to make the inputs; without it the row is absent.
    device: where it is timed, "cuda" (bfloat16) or "cpu" (float32).
    backward: what is timed is the gradient of `ours` (or of the rival) by these inputs; that by a network is
        the gradient by all its parameters. with_forward: and the call itself.
    checked: the outputs a rival must agree on, None for all; not those with noise of its own.
    own_weights: rivals that are built with weights of their own: they must give as many finite numbers as we
        do, which ones cannot be compared.
    slack: what ours may be off by, of its size, beside 1.5 times plain torch's error.
    same_bits: two calls of ours must give equal bits; not where torch's own convolutions do not.
    wall: launching is part of the time: no graph, `calls` calls in a row.
    make_check: as make without `tiny`, smaller, where the truth at full size would not fit: what the check
        before the time is run on.
    target_us, factors, launches, share, peak: the goals on an H200 in bfloat16: microseconds, how many times
        faster than each rival, kernels of one call, share of the nearer measured ceiling, bytes of memory
        beyond the inputs.
    """

    name: str
    make: Callable[[str, torch.dtype, bool], dict[str, object]]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    rivals: Mapping[str, Callable | str]
    bytes: int | Callable[[], int]
    flops: int | Callable[[], int] = 0
    images: int = 0
    package: str | None = None
    device: str = "cuda"
    backward: tuple[str, ...] = ()
    with_forward: bool = False
    checked: tuple[int, ...] | None = None
    own_weights: tuple[str, ...] = ()
    slack: float = 1e-6
    same_bits: bool = True
    wall: bool = False
    calls: int = 50
    make_check: Callable[[str, torch.dtype], dict[str, object]] | None = None
    target_us: float | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    launches: int | None = None
    share: float | None = None
    peak: int | None = None


CASES: dict[str, Case] = {}


def add(case: Case) -> None:
    if case.name in CASES:
        raise ValueError(f"a second case {case.name!r}: the name is what results are compared by")
    CASES[case.name] = case


def load() -> dict[str, Case]:
    """All rows, the ops' first."""
    for module in ("ops", "contrastive", "networks", "jobs", "patched"):
        importlib.import_module(f"benchmarks.cases.{module}")
    return CASES


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def needs(package: str, rival: Callable) -> Callable | str:
    """The rival, or why there is none."""
    return rival if installed(package) else f"{package} is not installed"


QUICK = False  # set by --quick: compilers may not search then


def _mode() -> str:
    # On a CPU its search compiles one C++ program after the other.
    return "default" if QUICK or not torch.cuda.is_available() else "max-autotune-no-cudagraphs"


def compiled(function: Callable, network: bool = False) -> Callable:
    """max-autotune without CUDA graphs of its own: every contestant is replayed from the benchmark's.

    network: compiling takes a minute or more, for which --quick has no time."""

    @functools.cache
    def make():
        return torch.compile(function, mode=_mode(), dynamic=False)

    def run(**inputs):
        return make()(**inputs)

    run.compiles, run.network = True, network
    return run


def compiled_module(module: torch.nn.Module) -> None:
    module.compile(mode=_mode(), dynamic=False)


def drawer(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = None if device == "meta" else torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:  # rounded to bfloat16, so that every dtype sees the same numbers
        return torch.randn(*shape, device=device, generator=generator).bfloat16().to(dtype)

    return draw


@contextlib.contextmanager
def running(impl: str) -> Iterator[None]:
    """Our networks choose their ops by themselves; here with impl="reference" none of them is fused."""
    from dalle2_fast.ops import _dispatch

    if impl != "reference":
        yield
        return
    with (
        mock.patch.object(_dispatch, "use_reference", lambda *_: True),
        mock.patch.object(_dispatch, "use_native", lambda *_: False),
    ):
        yield

