"""Record launches: the launchers of the ops run for any size and device, but their kernels do not run."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch

from tests.support.aot.compile import Case, function_of


class Launch(NamedTuple):
    kernel: Any  # the object that triton.jit returns
    args: tuple
    kwargs: dict

    @property
    def name(self) -> str:
        return function_of(self.kernel).__name__


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Append each launch of an interpreted kernel to the list instead of running it."""
    from triton.runtime.interpreter import InterpretedFunction

    from dalle2_fast.kernels import _interpreter

    found: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        found.append(Launch(self, args, kwargs))

    # The dispatch would try a product of bfloat16, which cannot be right if no kernel runs.
    with (
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(_interpreter, "has_bfloat16", lambda: True),
    ):
        yield found


@contextlib.contextmanager
def recorded_in(*modules: ModuleType) -> Iterator[list[Launch]]:
    """The same for all kernels that these modules launch, interpreted or compiled."""
    found: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            names = [name for name in vars(module) if name.endswith("_kernel")]
            recorders = {name: _Recorder(getattr(module, name), found) for name in names}
            stack.enter_context(mock.patch.multiple(module, **recorders))
        yield found


class _Recorder:
    """Records the launches of a kernel instead of running it."""

    def __init__(self, kernel, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.found.append(Launch(self.kernel, args, kwargs))


_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.bool: "*i1",
          torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip


def as_case(name: str, launch: Launch, varying: Collection[str], **options) -> Case:
    """A launch as a case to compile.

    varying: arguments whose value is not specialised. options: arguments of Case.
    """
    constants = {key: value for key, value in launch.kwargs.items() if key.isupper()}
    options |= {key: value for key, value in launch.kwargs.items() if key in ("num_warps", "num_stages")}
    signature = {}
    for argument, value in zip(
        inspect.signature(function_of(launch.kernel)).parameters, launch.args, strict=False
    ):
        if isinstance(value, torch.Tensor):
            signature[argument] = _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[argument] = "fp32"
        elif value is None or (value == 1 and argument not in varying):
            constants[argument] = value
        else:
            kind = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0 and argument not in varying
            signature[argument] = f"{kind}:16" if aligned else kind
    return Case(f"{name} {launch.name}", launch.kernel, signature, constants, **options)
