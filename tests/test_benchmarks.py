"""The benchmarks' registry without a GPU: each case at a tiny size does what it says, and the bytes add up.

What is timed on a GPU has passed the same check there, at the real size.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from cases import CASES, decoder_norms
from clock import check, ours, results_of


@pytest.mark.parametrize("name", list(CASES))
def test_ours_and_eager_agree_with_the_truth(name, kernel_device):
    case = CASES[name]
    inputs = case.make(kernel_device, torch.float32, True)
    check(case, "ours", ours(case, "fused"), inputs)
    check(case, "eager", case.rivals["eager"], inputs)


def test_what_is_wrong_is_not_timed():
    case = CASES["cross-attention forward masked"]
    inputs = case.make("cpu", torch.float32, True)
    right = ours(case, "reference")
    check(case, "ours", right, inputs)
    with pytest.raises(AssertionError, match="output 0: error"):
        check(case, "ours", lambda **inputs: 1.01 * right(**inputs), inputs)
    factors = iter([1.0, 1.0 + 1e-6])
    with pytest.raises(AssertionError, match="output 0: other bits the second time"):
        check(case, "ours", lambda **inputs: next(factors) * right(**inputs), inputs)
    check(case, "rival", lambda **inputs: 1.01 * right(**inputs), inputs)
    with pytest.raises(AssertionError, match="rival: output 0 is off by .*: not the same formula"):
        check(case, "rival", lambda **inputs: 1.1 * right(**inputs), inputs)


@pytest.mark.parametrize("name", list(CASES))
def test_bytes_are_those_of_the_inputs_and_outputs(name):
    """Catches a row whose floor, and so its share of the copy's speed, belongs to other shapes."""
    case = CASES[name]
    if "norms of the decoder" in name:
        counted = sum(2 * 2 * 2 * math.prod(shape) for shape, _, _ in decoder_norms())
        assert len(decoder_norms()) == 95
    else:
        inputs = case.make("meta", torch.bfloat16, False)
        counted = sum(bytes_of(value) for value in inputs.values())
        if not case.backward:
            with torch.no_grad():
                counted += sum(map(bytes_of, results_of(case, ours(case, "reference"), inputs).values()))
    if case.backward:
        return  # what a gradient reads again is the kernel's choice
    unread = 0 if "step" not in name else bytes_of(inputs["output"]) - case.bytes // 6 * 3
    if "dynamic" in name:
        unread = 0
    assert counted - unread == pytest.approx(case.bytes, rel=0.02)


def bytes_of(value) -> int:
    return 0 if value is None else value.numel() * value.element_size()
