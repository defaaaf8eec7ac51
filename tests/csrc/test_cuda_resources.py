"""What csrc/cuda/contrastive.cu compiles to for each target of a build: registers, spills, wide loads and
stores, and no float64 in the kernels that read every element. Needs no GPU."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.native.machine_code import compile_cubin, dump, find_built_object

SOURCE = "cuda/contrastive.cu"
TARGETS = ("80", "86", "89", "90a", "100", "120")
# The kernels that read every element; the others do a thousandth of the work.
LARGE = ("sum_tile", "sum_about_maximum", "apply_epilogue")
FLOAT64 = re.compile(r"^(?:D(?:ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64H)\b|\bF64\b|\.F64")


class Kernel(NamedTuple):
    name: str  # apply_epilogue<Clip, __half>
    registers: int
    stack: int
    instructions: list[str]


def readable(mangled: str) -> str:
    """_ZN11dalle2_fast4cuda14apply_epilogueINS0_12ClipEpilogueE6__half... -> apply_epilogue<Clip, __half>"""
    kinds = r"f|\d+__\w+?|NS0_10NoGradientE"
    arguments = rf"I(?:NS0_\d+(\w+?)EpilogueE)?({kinds})EEv"
    words = re.match(rf"_ZN11dalle2_fast4cuda\d+([a-z_]+?)(?:{arguments}|E)", mangled)
    kind = {"f": "float", "13__nv_bfloat16": "__nv_bfloat16", "6__half": "__half",
            "NS0_10NoGradientE": "NoGradient"}  # fmt: skip
    template = ", ".join(filter(None, (words[2], kind.get(words[3]))))
    return f"{words[1]}<{template}>" if template else words[1]


def machine_code(folder: Path) -> list[Path]:
    """From the last build if nothing has changed since; otherwise compiled here (6 s per target)."""
    built = find_built_object(SOURCE)
    if built is not None:
        return [built]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda target: compile_cubin(SOURCE, target, folder), TARGETS))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict[str, Kernel]]:
    """{target: {name: kernel}}"""
    compiled = {target: {} for target in TARGETS}
    for path in machine_code(tmp_path_factory.mktemp("resources")):
        text = dump(path, "-sass", "-res-usage")
        # A cubin has one target; in an object, the part of each target begins with "arch = sm_90a".
        parts = re.split(r"^arch = sm_", text, flags=re.MULTILINE)[1:] or [f"{path.stem[3:]}\n{text}"]
        for part in parts:
            read(part, compiled.setdefault(part.split()[0], {}))
    return compiled


def kernels_for(target: str, compiled: dict[str, dict[str, Kernel]]) -> dict[str, Kernel]:
    if not compiled[target]:
        pytest.skip(f"the last build was not for sm_{target}")
    return compiled[target]


def read(part: str, kernels: dict[str, Kernel]) -> None:
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", part)
    for name, registers, stack in usage:
        kernels[readable(name)] = Kernel(readable(name), int(registers), int(stack), [])
    for function in part.split("Function : ")[1:]:
        # "/*0010*/   @!P0 LDG.E.128 R4, [R2.64] ;": without the predicate
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", function)
        kernels[readable(function.split()[0])].instructions.extend(lines)


@pytest.mark.parametrize("target", TARGETS)
def test_registers(compiled, target):
    # Catches: an array that is indexed at run time and so lives in memory, spills, too few threads.
    kernels = kernels_for(target, compiled)
    assert {name.partition("<")[0] for name in kernels} >= {*LARGE, "merge_sums", "split_lse", "add_partials"}
    assert len([name for name in kernels if name.startswith("apply_epilogue<")]) == 11
    for kernel in kernels.values():
        assert kernel.stack == 0, kernel[:3]
        # Three blocks of 256 threads share the 65536 registers of a multiprocessor, in units of 8 per thread.
        # sum_about_maximum, which few tiles need, holds 128 logits and may run alone.
        assert kernel.registers <= (255 if kernel.name == "sum_about_maximum" else 80), kernel[:3]


@pytest.mark.parametrize("target", TARGETS)
def test_instructions(compiled, target):
    # Catches: a literal without an f, loads of one element each, a slow exp or division, tables in memory.
    for kernel in kernels_for(target, compiled).values():
        if not kernel.name.startswith(LARGE):
            continue
        codes = [line.split()[0] for line in kernel.instructions]
        assert len(codes) > 100, "the output of cuobjdump was not understood"
        float64 = [line for line in kernel.instructions if FLOAT64.search(line)]
        assert not float64, f"{kernel.name}: {float64[:3]}"
        assert any(code.startswith("LDG") and ".128" in code for code in codes), kernel.name
        assert any(code.startswith("MUFU.EX2") for code in codes), kernel.name
        assert not any(code.startswith(("LDL", "STL")) for code in codes), kernel.name
        width = {"__half>": ".64", "__nv_bfloat16>": ".64", "float>": ".128"}.get(kernel.name.split()[-1])
        if width is not None:
            assert any(code.startswith("STG") and width in code for code in codes), kernel.name
