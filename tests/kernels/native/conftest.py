"""The tests of the native module run on every instruction set of this processor."""

from __future__ import annotations

import pytest

from dalle2_fast.ops import _native

SETS = ["portable", "AVX2", "AVX-512", "AVX-512 with BF16"]


@pytest.fixture(params=SETS)
def instructions(request):
    """The name of the vector instructions that the native module uses in this test."""
    if _native.WHY_ABSENT is not None:
        pytest.skip(_native.WHY_ABSENT)
    from dalle2_fast import _C

    before = SETS.index(_C.cpu.instruction_set())
    if not _C.cpu.choose_instruction_set(SETS.index(request.param)):
        pytest.skip(f"this processor has no {request.param}")
    assert _C.cpu.instruction_set() == request.param
    yield request.param
    _C.cpu.choose_instruction_set(before)
