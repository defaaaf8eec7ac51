"""What csrc/contrastive_cuda.cu compiles to for each GPU of a build: registers, spills, wide loads and
stores, no float64 where the elements are. Needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("80", "86", "89", "90a", "100", "120")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# The kernels that read every element; the others are a thousandth of the work.
LARGE = ("sum_tile", "sum_about_maximum", "epilogue")
FLOAT64 = re.compile(r"^(?:D(?:ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64H)\b|\bF64\b|\.F64")


class Kernel(NamedTuple):
    name: str  # epilogue<ClipRule, __half>
    registers: int
    stack: int
    instructions: list[str]


def find_cuobjdump() -> str | None:
    """On PATH, in the toolkit's usual place, or in Triton's package, which ships it."""
    places = [None, "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return next(filter(None, (shutil.which("cuobjdump", path=place) for place in places)), None)


def readable(mangled: str) -> str:
    """Of _ZN11dalle2_fast4cuda8epilogueINS0_8ClipRuleE6__halfEEv...: epilogue<ClipRule, __half>."""
    kinds = r"f|\d+__\w+?|NS0_7NothingE"
    arguments = rf"I(?:NS0_\d+(\w+?Rule)E)?({kinds})EEv"
    words = re.match(rf"_ZN11dalle2_fast4cuda\d+([a-z_]+?)(?:{arguments}|E)", mangled)
    kind = {"f": "float", "13__nv_bfloat16": "__nv_bfloat16", "6__half": "__half", "NS0_7NothingE": "Nothing"}
    template = ", ".join(filter(None, (words[2], kind.get(words[3]))))
    return f"{words[1]}<{template}>" if template else words[1]


def machine_code(folder: Path) -> list[Path]:
    """Of the last build, if nothing has changed since; otherwise compiled here (6 s for each target)."""
    names = ("contrastive_cuda.cu", "contrastive_cuda.cuh", "contrastive.h")
    changed = max((ROOT / "csrc" / name).stat().st_mtime for name in names)
    for built in ROOT.glob("build/native-*/contrastive_cuda.cu.o"):
        if built.stat().st_mtime > changed:
            return [built]
    if NVCC is None:
        pytest.skip("needs nvcc")

    def compile_for(target: str) -> Path:
        cubin = folder / f"sm_{target}.cubin"
        flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{target}", "-cubin"]
        source = ROOT / "csrc" / "contrastive_cuda.cu"
        subprocess.run([NVCC, *flags, f"-I{ROOT / 'csrc'}", source, "-o", cubin], check=True)
        return cubin

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_for, TARGETS))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict[str, Kernel]]:
    """{target: {name: kernel}}"""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump: of the CUDA toolkit, or of Triton")
    compiled = {target: {} for target in TARGETS}
    for path in machine_code(tmp_path_factory.mktemp("resources")):
        command = [cuobjdump, "-sass", "-res-usage", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # A cubin has one target; in an object, each target's part begins with "arch = sm_90a".
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
    assert {name.partition("<")[0] for name in kernels} >= {*LARGE, "merge_sums", "split_lse", "add_up"}
    assert len([name for name in kernels if name.startswith("epilogue<")]) == 11
    for kernel in kernels.values():
        assert kernel.stack == 0, kernel[:3]
        # Three blocks of 256 threads share a multiprocessor's 65536 registers, granted by the 8 per thread.
        # sum_about_maximum, the rare way, holds 128 logits and may be alone.
        assert kernel.registers <= (255 if kernel.name == "sum_about_maximum" else 80), kernel[:3]


@pytest.mark.parametrize("target", TARGETS)
def test_instructions(compiled, target):
    # Catches: a literal without an f, loads of one element each, a slow exp or division, tables in memory.
    for kernel in kernels_for(target, compiled).values():
        if not kernel.name.startswith(LARGE):
            continue
        codes = [line.split()[0] for line in kernel.instructions]
        assert len(codes) > 100, "the text was not understood"
        float64 = [line for line in kernel.instructions if FLOAT64.search(line)]
        assert not float64, f"{kernel.name}: {float64[:3]}"
        assert any(code.startswith("LDG") and ".128" in code for code in codes), kernel.name
        assert any(code.startswith("MUFU.EX2") for code in codes), kernel.name
        assert not any(code.startswith(("LDL", "STL")) for code in codes), kernel.name
        width = {"__half>": ".64", "__nv_bfloat16>": ".64", "float>": ".128"}.get(kernel.name.split()[-1])
        if width is not None:
            assert any(code.startswith("STG") and width in code for code in codes), kernel.name
