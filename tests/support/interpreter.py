"""Triton's kernels on the CPU, within a process whose ops otherwise run there in dalle2_fast._C."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dalle2_fast.kernels import _op
from dalle2_fast.ops import _dispatch


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it, impl="fused" on the CPU means Triton's interpreter, as with TRITON_INTERPRET=1."""
    _op._native_library._destroy()
    _dispatch._INTERPRETED = True
    _dispatch._kernel_answers.clear()
    try:
        yield
    finally:
        _dispatch._INTERPRETED = False
        _dispatch._kernel_answers.clear()
        _op._native_library = torch.library.Library(_op.NAMESPACE, "IMPL")
        for name, run in _op.native.items():
            _op._native_library.impl(name, run, "CPU")
