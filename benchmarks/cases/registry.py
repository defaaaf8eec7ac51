"""The registry of everything that is timed. To add a row, add a `Case` in one of the modules of this folder.

A case makes a set of inputs, runs our implementation on it, and names rivals that compute the same. A rival
whose package is not installed is listed as absent, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

Inputs = Mapping[str, object]  # tensors, None, and the nn.Module where a whole network is timed


@dataclass(frozen=True)
class Case:
    """A row of the table: one shape of an op, a network or a job.

    make(device, dtype, tiny) -> inputs, seeded. Tiny inputs are for a check on the CPU.
    ours(impl, **inputs) -> tensor or tensors; with impl="reference" and float64 inputs it is the truth.
    rivals: name -> function of the inputs, or a text that says why there is none.
    bytes: lower bound of the memory traffic (every input is read once, every output is written once).
    flops: operations of the matrix units. bytes and flops are numbers, or functions that compute them when
        they are needed.
    images: number of images that one call generates or trains on; 0: the row has no images per second.
    package: package that must be installed to make the inputs; without it the row is absent.
    device: where the case is timed, "cuda" (bfloat16) or "cpu" (float32).
    backward: inputs whose gradient is timed, of `ours` or of the rival. For a network the gradient is that of
        all its parameters.
    with_forward: the forward pass is timed together with the backward pass.
    checked_outputs: indices of the outputs in which a rival must agree, None for all. Outputs with random
        noise are left out.
    unshared_weights: names of rivals that are built with other weights. Their outputs cannot be compared;
        they must have the same size and be finite.
    slack: error of ours that is allowed, relative to the norm, in addition to 1.5 times that of plain torch.
    same_bits: two calls of ours must give equal bits. False where torch's convolutions do not.
    wall_clock: the launch is part of the time: no CUDA graph, but `calls` calls in a row.
    make_check: like make, without `tiny`, for the check before timing; set where the float64 truth of the
        full size would not fit into memory.
    target_us, target_factors, target_launches, target_share, target_peak_bytes: the goals on an H200 in
        bfloat16: microseconds; speed-up over each rival; kernels per call; share of the nearer measured
        ceiling; bytes of memory beyond the inputs.
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
    checked_outputs: tuple[int, ...] | None = None
    unshared_weights: tuple[str, ...] = ()
    slack: float = 1e-6
    same_bits: bool = True
    wall_clock: bool = False
    calls: int = 50
    make_check: Callable[[str, torch.dtype], dict[str, object]] | None = None
    target_us: float | None = None
    target_factors: Mapping[str, float] = field(default_factory=dict)
    target_launches: int | None = None
    target_share: float | None = None
    target_peak_bytes: int | None = None


# Modules of benchmarks/cases in the order of their rows.
TRITON_OPS = ("group_norm_silu", "cross_attention", "diffusion_step")
MODULES = (*TRITON_OPS, "contrastive", "networks", "generation", "training_steps", "patched", "cpu")
CASES: dict[str, Case] = {}


def device_suffix(device: str) -> str:
    """The end of a case's name: rows of a CPU say so."""
    return " (CPU)" if device == "cpu" else ""


def add(case: Case) -> None:
    if case.name in CASES:
        raise ValueError(f"a second case {case.name!r}: results are compared by name, so it must be unique")
    CASES[case.name] = case


def load(modules: Sequence[str] = MODULES) -> dict[str, Case]:
    """Import these modules, which register their rows, and return the registry."""
    for module in modules:
        importlib.import_module(f"benchmarks.cases.{module}")
    return CASES


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def needs(package: str, rival: Callable) -> Callable | str:
    """The rival, or why it is absent."""
    return rival if installed(package) else f"{package} is not installed"


QUICK = False  # set by --quick: compilers then skip their search for the fastest configuration


def _mode() -> str:
    # On a CPU the search of max-autotune compiles one C++ program after the other.
    return "default" if QUICK or not torch.cuda.is_available() else "max-autotune-no-cudagraphs"


def compiled(function: Callable, network: bool = False) -> Callable:
    """torch.compile with max-autotune but without CUDA graphs: the benchmark captures every implementation.

    network: compiling takes a minute or more, for which --quick has no time.
    """

    @functools.cache
    def make():
        from torch._functorch import config

        config.donated_buffer = False  # the clock repeats a backward pass, which must not reuse its inputs
        return torch.compile(function, mode=_mode(), dynamic=False)

    def run(**inputs):
        return make()(**inputs)

    run.compiles, run.network = True, network
    return run


def compiled_module(module: torch.nn.Module) -> None:
    module.compile(mode=_mode(), dynamic=False)


def rounded_randn(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function of a shape, whose numbers are rounded to bfloat16: every dtype sees the same ones."""
    generator = None if device == "meta" else torch.Generator(device=device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16().to(dtype)

    return randn


@contextlib.contextmanager
def op_implementation(impl: str) -> Iterator[None]:
    """Within the block, our networks use the reference of every op (impl="reference") or choose as usual."""
    from dalle2_fast.ops import _dispatch

    if impl != "reference":
        yield
        return
    with (
        mock.patch.object(_dispatch, "use_reference", lambda *_, **__: True),
        mock.patch.object(_dispatch, "use_reference_of_cpu_op", lambda *_: True),
        mock.patch.object(_dispatch, "use_native", lambda *_: False),
    ):
        yield

