"""Compile Triton kernels for GPUs that this machine does not have, and read which resources they use.

    case = Case("apply bf16", _apply_kernel, {"x": "*bf16", "y": "*bf16", "n": "i32"}, {"BLOCK": 1024}, 4, 1)
    compile_cases([case], (80, 90))["apply bf16", 90].registers

A process that interprets kernels cannot compile them. Therefore other processes, one per core, do the work;
they find a kernel by its module and name. Cubins stay in Triton's cache.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[3]
CAPABILITIES = (80, 86, 89, 90, 100, 120)  # A100, 3090, 4090, H100 and H200, B200, 5090
# KiB of shared memory that a block may use; compiling does not check it.
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


class Case(NamedTuple):
    """A launch configuration of a kernel.

    signature: the arguments in any order, except those in constexprs: "*fp32", "*bf16", "i32", "i64", "fp32",
        ... A pointer counts as 16-byte aligned, as torch's allocations are; ":1" leaves that out
        ("*bf16:1"). An integer counts as unknown; ":16" says that 16 divides it ("i32:16").
    constexprs: values of the constexpr arguments, None for a pointer that is not given.
    capabilities: where this configuration is chosen.
    hot: time matters here: no spills.
    hgmma: must use the tensor cores of sm_90 as wgmma, there.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    capabilities: tuple[int, ...] = CAPABILITIES
    hot: bool = True
    hgmma: bool = False


class Resources(NamedTuple):
    registers: int  # per thread; 255 is the most there are
    stack: int  # bytes per thread in local memory
    spills: int  # instructions that load or store local memory
    shared: int  # bytes per block
    fp64: int  # float64 instructions in the PTX
    mma: int  # tensor-core instructions of any kind, in the PTX
    hgmma: int  # those of them that are wgmma


def all_cases() -> dict[str, Case]:
    """The cases of every op, those of aot_cases() in the files aot_cases_<op>.py: {"op: case": case}."""
    cases = {}
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        for case in importlib.import_module(f"tests.support.aot.{path.stem}").aot_cases():
            case = Case(*case)
            name = f"{path.stem.removeprefix('cases_')}: {case.name}"
            assert name not in cases, f"two cases are called {name}"
            cases[name] = case._replace(name=name)
    return cases


class CompileError(Exception):
    """A kernel did not compile."""


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Resources:
    case = Case("kernel", kernel, signature, constexprs, num_warps, num_stages)
    return compile_cases([case], (capability,))["kernel", capability]


def compile_cases(
    cases: Iterable[Case | tuple], capabilities: Iterable[int] = CAPABILITIES
) -> dict[tuple[str, int], Resources]:
    """Compile each case for those of its capabilities that are wanted; keys are (case name, capability)."""
    wanted = {
        (case.name, capability): _job(case, capability)
        for case in (Case(*case) for case in cases)
        for capability in capabilities
        if capability in case.capabilities
    }
    jobs = list({repr(job): job for job in wanted.values()}.values())  # several cases may be one and the same
    workers = max(1, min(len(_cores()), len(jobs) // 4))
    shares = [jobs[start::workers] for start in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        answers = [answer for part in pool.map(_work_elsewhere, shares) for answer in part]
    compiled = {repr(job): answer for job, answer in zip(sum(shares, []), answers, strict=True)}
    results = {}
    for (name, capability), job in wanted.items():
        answer = compiled[repr(job)]
        if isinstance(answer, str):
            raise CompileError(f"{name}, sm_{capability}: {answer}")
        results[name, capability] = Resources(**answer)
    return results


def function_of(kernel: Any) -> Any:
    """The Python function that the interpreter's or the compiler's object wraps."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel


def fingerprint(case: Case) -> str:
    """A hash of the configuration and of the code of the case's kernel and of what it calls.

    Comments, docstrings and the module of the code do not change it.
    """
    _, *configuration = _job(case, 0)  # without the module
    parts = [*map(str, configuration), *_code(function_of(case.kernel))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _code(function: Any) -> tuple[str, ...]:
    """The code of a kernel and of the jit functions that it names, and the constants that it names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    parts = {ast.dump(tree)}
    for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        value = function.__globals__.get(name)
        if hasattr(value, "fn") and value.fn is not function and not isinstance(value, type):
            parts |= set(_code(function_of(value)))
        elif isinstance(getattr(value, "value", value), (int, float, str)):  # tl.constexpr has a value
            parts.add(f"{name} = {value}")
    return tuple(sorted(parts))


def _job(case: Case, capability: int) -> tuple:
    function = function_of(case.kernel)
    signature, constexprs = dict(sorted(case.signature.items())), dict(sorted(case.constexprs.items()))
    launch = (case.num_warps, case.num_stages)
    return (function.__module__, function.__qualname__, signature, constexprs, *launch, capability)


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}


def _work_elsewhere(jobs: list[tuple]) -> list:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run([sys.executable, __file__], input=pickle.dumps(jobs), env=environment, cwd=ROOT,
                          capture_output=True)  # fmt: skip
    if done.returncode != 0:
        raise CompileError(done.stderr.decode()[-4000:])
    return json.loads(done.stdout.decode().splitlines()[-1])


# --------------------------------------------------------------------------------- in the compiling processes

_TOOLS = Path("backends/nvidia/bin")


def _compile(module, name, signature, constexprs, num_warps, num_stages, capability) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = getattr(importlib.import_module(module), name)
    while not hasattr(kernel, "arg_names"):
        kernel = kernel.fn
    unknown = (set(signature) | set(constexprs)) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"not in both the kernel and its case: {sorted(unknown)}")
    types, aligned = {}, {}
    for index, argument in enumerate(kernel.arg_names):  # the order is the ABI's
        given = "constexpr" if argument in constexprs else signature[argument]
        kind, _, hint = given.partition(":")
        types[argument] = kind
        if hint == "16" or (kind.startswith("*") and hint != "1"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, types, dict(constexprs), aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "shared": compiled.metadata.shared,
        "fp64": len(re.findall(r"^(?!\s*\.reg).*\.f64\b", ptx, re.MULTILINE)),
        "mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        "hgmma": len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
        **_read(compiled.asm["cubin"]),
    }


def _read(cubin: bytes) -> dict[str, int]:
    """Registers, stack, and the instructions that touch it."""
    import tempfile

    import triton

    tools = Path(triton.__file__).parent / _TOOLS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)

        def tool(*command: str) -> str:
            return subprocess.run([str(tools / command[0]), *command[1:], str(path)], check=True, text=True,
                                  capture_output=True).stdout  # fmt: skip

        usage = tool("cuobjdump", "-res-usage")
        numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
        spills = 0
        if numbers["STACK"] > 0:  # nvdisasm takes as long as compiling: only where there is something to see
            spills = len(re.findall(r"\b(?:LDL|STL)\b", tool("nvdisasm", "-c")))
    return {"registers": numbers["REG"], "stack": numbers["STACK"], "spills": spills}


def _main() -> None:
    answers = []
    for job in pickle.load(sys.stdin.buffer):
        try:
            answers.append(_compile(*job))
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    print()
    print(json.dumps(answers))


if __name__ == "__main__":
    _main()
