"""Every launch configuration of every kernel, compiled for six GPUs: it fits, and uses what it was made for.

The cases are the aot_cases() of tests/support/aot/cases_<op>.py. Compiling all of them takes minutes, so
`benchmarks/timing/compile_report.py` does that and writes a report. Here the report is checked against the
limits; it must be that of the current kernels, and one case of each kernel is compiled again. Triton's
interpreter shows none of these faults. Compiling needs Triton, but no GPU.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.support.aot.compile import (
    CAPABILITIES,
    SHARED_LIMIT,
    Case,
    CompileError,
    Resources,
    all_cases,
    compile_cases,
    compile_kernel,
    fingerprint,
    function_of,
)

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "benchmarks" / "results" / "compile_resources.json"
Compiled = Mapping[tuple[str, int], tuple[Case, Resources]]  # by name and capability


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return all_cases()


@pytest.fixture(scope="session")
def reported(cases) -> Compiled:
    entries = json.loads(REPORT.read_text())["cases"]
    return {
        (name, int(capability)): (cases[name], Resources(*numbers))
        for name in cases.keys() & entries
        for capability, numbers in entries[name]["resources"].items()
    }


@pytest.fixture(scope="session")
def fresh(cases) -> Compiled:
    """The most important case of each kernel, compiled now for a GPU with little shared memory and for one
    with wgmma."""
    chosen: dict[str, Case] = {}
    for case in sorted(cases.values(), key=lambda one: (90 in one.capabilities, one.hgmma, one.hot)):
        chosen[function_of(case.kernel).__qualname__] = case
    results = compile_cases(chosen.values(), (89, 90))
    assert {name for name, sm in results if sm == 90} == {case.name for case in chosen.values()}
    return {key: (cases[key[0]], resources) for key, resources in results.items()}


def faults(compiled: Compiled, wrong: Callable) -> list[str]:
    return [
        f"{name}, sm_{capability}: {resources}"
        for (name, capability), (case, resources) in compiled.items()
        if wrong(case, resources, capability)
    ]


def over_shared_memory(case, resources, capability) -> bool:
    return resources.shared > SHARED_LIMIT[capability] * 1024


def spills_while_hot(case, resources, capability) -> bool:
    return case.hot and (resources.spills > 0 or resources.stack > 0)


def uses_float64(case, resources, capability) -> bool:
    return resources.fp64 > 0


def misses_wgmma(case, resources, capability) -> bool:
    return case.hgmma and capability == 90 and resources.hgmma == 0


LIMITS = [over_shared_memory, spills_while_hot, uses_float64, misses_wgmma]


def test_the_report_is_that_of_these_kernels(cases):
    entries = json.loads(REPORT.read_text())["cases"]
    now = {name: fingerprint(case) for name, case in cases.items()}
    then = {name: entry["fingerprint"] for name, entry in entries.items()}
    stale = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    assert not stale, f"run `python -m benchmarks.timing.compile_report`; out of date: {stale}"
    for name, case in cases.items():
        assert set(entries[name]["resources"]) == set(map(str, case.capabilities)), name


@pytest.mark.parametrize("wrong", LIMITS)
def test_no_reported_configuration(wrong, reported):
    found = faults(reported, wrong)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("wrong", LIMITS)
def test_no_configuration_compiled_now(wrong, fresh):
    found = faults(fresh, wrong)
    assert not found, "\n".join(found)


def launched_kernels() -> set[tuple[str, str]]:
    """(module, function) of each function in kernels/ whose name ends in _kernel."""
    return {
        (".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts), node.name)
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def test_every_kernel_has_a_case_for_every_gpu(cases):
    # Catches: a kernel or a GPU that was forgotten, of which the other tests would say nothing.
    covered: dict[tuple[str, str], set[int]] = {}
    for case in cases.values():
        function = function_of(case.kernel)
        key = (function.__module__.removeprefix("dalle2_fast.kernels."), function.__name__)
        covered.setdefault(key, set()).update(case.capabilities)
    assert launched_kernels() == set(covered)
    assert {key: has for key, has in covered.items() if has != set(CAPABILITIES)} == {}


def test_attention_is_made_for_wgmma(cases):
    # Catches: a case that no longer asks for it, after which its absence would go unseen.
    asking = {function_of(case.kernel).__name__ for case in cases.values() if case.hgmma}
    assert {"_short_forward_kernel", "_long_forward_kernel"} <= asking
    assert any("backward" in name or name in ("_queries_kernel", "_keys_kernel") for name in asking)


# ---------------------------------------------------------------------------------- do the limits see faults?


@pytest.fixture(scope="session")
def toys() -> Compiled:
    from tests.support.aot.toys import add_kernel, float64_kernel, matmul_kernel

    pointers = {"x": "*bf16", "y": "*bf16", "out": "*fp32"}
    cases = [
        Case("add", add_kernel, {**pointers, "n": "i32", "scale": "fp32"}, {"BLOCK": 1024}),
        Case("float64", float64_kernel, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 128}),
        Case("tensor cores", matmul_kernel, pointers, {"M": 64, "N": 64, "K": 64}, hgmma=True),
        Case("spill", matmul_kernel, pointers, {"M": 64, "N": 256, "K": 16}, num_warps=1),
    ]
    results = compile_cases(cases, (90,))
    return {key: (case, results[key]) for case in cases for key in [(case.name, 90)]}


def test_the_limits_see_faults(toys):
    assert [fault.split(",")[0] for fault in faults(toys, uses_float64)] == ["float64"]
    assert [fault.split(",")[0] for fault in faults(toys, spills_while_hot)] == ["spill"]
    assert faults(toys, over_shared_memory) == faults(toys, misses_wgmma) == []
    _, add = toys["add", 90]
    assert 8 <= add.registers <= 64 and add.mma == 0
    case, dot = toys["tensor cores", 90]
    assert dot.hgmma == dot.mma > 0 and dot.shared == 2 * 64 * 64 * 2
    assert misses_wgmma(case, add, 90)
    assert over_shared_memory(case, dot._replace(shared=100 * 1024), 86)


def test_errors():
    from tests.support.aot.toys import add_kernel

    with pytest.raises(CompileError, match="kernel, sm_80: ValueError: not in both .*'BLOCK'.*'scale'"):
        compile_kernel(add_kernel, {"x": "*fp32"}, {}, 80)


def test_a_fingerprint_is_of_code_and_configuration():
    from tests.support.aot.toys import add_kernel, matmul_kernel

    types = {"x": "*fp32", "y": "*fp32", "out": "*fp32"}
    case = Case("a", matmul_kernel, types, {"M": 16, "N": 16, "K": 16})
    same = case._replace(name="b", capabilities=(80,), hot=False)
    others = [
        case._replace(kernel=add_kernel),
        case._replace(signature={**types, "x": "*bf16"}),
        case._replace(constexprs={"M": 16, "N": 16, "K": 32}),
        case._replace(num_warps=8),
        case._replace(num_stages=1),
    ]
    assert fingerprint(same) == fingerprint(case)
    assert len({fingerprint(other) for other in [case, *others]}) == 6
