"""What csrc/sm90/contrastive.cu compiles to: registers, shared memory, wgmma and TMA. Needs no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.native.machine_code import compile_cubin, dump, find_built_object

SOURCE = "sm90/contrastive.cu"


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory) -> Path:
    """From the last build if nothing has changed since; otherwise compiled here (half a minute)."""
    return find_built_object(SOURCE) or compile_cubin(SOURCE, "90a", tmp_path_factory.mktemp("sm90"))


def test_compiled_resources(machine_code):
    """Catches a register too many, an array indexed at run time, static shared memory added to ours."""
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", dump(machine_code, "-res-usage")
    )
    kernels = [fields for fields in usage if "product_kernel" in fields[0]]
    assert len(kernels) == 8  # four epilogues, two dtypes
    for name, registers, stack, shared in kernels:
        # 168 at the start, an equal part for three warpgroups; setmaxnreg then moves registers from the
        # producer to the consumers. 1 KB of shared memory belongs to the system.
        assert (int(registers), int(stack), int(shared)) == (168, 0, 1024), name


def test_compiled_instructions(machine_code):
    """Catches products or copies compiled to something else, spills, and wgmma that waits for each other."""
    functions = dump(machine_code, "-sass").split("Function : ")
    kernels = {text.split()[0]: text for text in functions if "product_kernel" in text.split()[0]}
    assert len(kernels) == 8
    for name, text in kernels.items():
        assert text.count("HGMMA.64x256x16.F32") == 4, name
        assert (
            len(re.findall(r"UTMALDG\.2D ", text)) == len(re.findall(r"UTMALDG\.2D\.MULTICAST", text)) == 1
        ), name
        assert text.count("USETMAXREG") == 2, name
        # Of a stage's four products only the last ends a group; one group stays in flight.
        assert text.count("gsb0, 0x1") == 1 and text.count("gsb0, 0x0") == 1, name
        assert not re.search(r"\b(STL|LDL)\b", text), f"{name} spills"
