"""Facts about the kernels that need no GPU: launches, bytes by construction, compiled resources.

    python -m benchmarks.timing.compile_report      writes benchmarks/results/compile_resources.json and .md

Every launch configuration of every kernel is compiled for six GPUs, about a second each. Only configurations
that changed since the last report are compiled again. tests/kernels/test_aot.py rejects an outdated report.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version

os.environ["TRITON_INTERPRET"] = "1"  # so that the launchers of our ops run on the CPU

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.cases import registry
from benchmarks.cases.registry import Case
from benchmarks.timing.agreement import ours, prepare
from benchmarks.timing.clock import timed_job
from benchmarks.timing.launch_counts import CountLaunches
from benchmarks.timing.provenance import RESULTS, commit, versions, write
from tests.support.aot.compile import (
    CAPABILITIES,
    Resources,
    all_cases,
    compile_cases,
    fingerprint,
    function_of,
)
from tests.support.launches import Launch, recorded

JSON = RESULTS / "compile_resources.json"
CHUNK = 40  # compilations between two writes of the file


# -------------------------------------------------------------------------------------------------- resources


def load() -> dict:
    return json.loads(JSON.read_text()) if JSON.exists() else {"cases": {}}


def save(cases: dict, launches: dict) -> dict:
    report = {
        "what": list(Resources._fields),
        "commit": commit(),
        "versions": versions("triton"),
        "launches": launches,
        "cases": cases,
    }
    text = json.dumps(report, indent=1)
    one_line = re.sub(r"\[[\d\s,]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    write(JSON, one_line + "\n")
    return report


def update(launches: dict) -> dict:
    """Compile what is new. The file is written after every CHUNK, so that an interrupted run is not lost."""
    report = load()
    known = {entry["fingerprint"]: entry["resources"] for entry in report["cases"].values()}
    if report.get("versions", {}).get("triton") != version("triton"):
        known = {}
    done, missing = {}, []
    for name, case in all_cases().items():
        key = fingerprint(case)
        found = {str(sm): known.get(key, {}).get(str(sm)) for sm in case.capabilities}
        done[name] = {
            "fingerprint": key,
            "kernel": function_of(case.kernel).__name__,
            "hot": case.hot,
            "resources": {sm: numbers for sm, numbers in found.items() if numbers is not None},
        }
        missing += [case._replace(capabilities=(int(sm),)) for sm in found if found[sm] is None]
    for start in range(0, len(missing), CHUNK):
        print(f"{start} of {len(missing)} compiled", file=sys.stderr, flush=True)
        for (name, sm), resources in compile_cases(missing[start : start + CHUNK]).items():
            done[name]["resources"][str(sm)] = list(resources)
        save(done, launches)
    return save(done, launches)


# ----------------------------------------------------------------------------------------- launches and bytes


def launches_of(case: Case, function: Callable) -> list[Launch]:
    """Each launch at the real size. No kernel runs, no data is touched."""
    inputs = {
        key: None if value is None else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        for key, value in case.make("meta", torch.bfloat16, False).items()
    }
    with recorded() as launches:
        job = timed_job(case, function, *prepare(case, inputs))
        launches.clear()  # of the forward pass, where a row times the gradient alone
        job()
    return launches


def bytes_of(launch: Launch) -> int:
    """Of its tensors, each of which counts once."""
    return sum(map(_bytes, (*launch.args, *launch.kwargs.values())))


def _bytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def count_launches() -> dict[str, dict]:
    counts = {}
    for name, case in registry.load(registry.TRITON_OPS).items():
        found = launches_of(case, ours(case, "fused"))
        with FakeTensorMode():
            inputs = case.make("cpu", torch.bfloat16, False)
            job = timed_job(case, case.rivals["eager"], *prepare(case, inputs))
            with CountLaunches() as mode:
                job()
        kernels: dict[str, int] = {}
        for launch in found:
            kernels[launch.name] = kernels.get(launch.name, 0) + 1
        moved = sum(map(bytes_of, found))
        counts[name] = {"kernels": kernels, "bytes": moved, "floor": case.bytes, "eager_ops": mode.op_count}
    return counts


# ---------------------------------------------------------------------------------------------------- as text


def as_text(report: dict) -> str:
    used = report["versions"]
    lines = [
        "# The kernels without a GPU: launches, bytes, compiled resources",
        "",
        f"Written by `python -m benchmarks.timing.compile_report` with Triton {used['triton']} and torch "
        f"{used['torch']}. Nothing here is a time.",
        "",
        "## Launches and bytes by construction",
        "",
        "Shapes of the acceptance table in bfloat16, configured for an H100. `MB` counts every tensor that a",
        "launch gets, once per launch; `MB at least` counts every input and output once. `ops of eager` are",
        "the ops of plain PyTorch that make or change data.",
        "",
        "| case | launches | kernels | MB | MB at least | ops of eager |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["launches"].items():
        kernels = ", ".join(f"{count} x {kernel}" for kernel, count in row["kernels"].items())
        lines.append(
            f"| {name} | {sum(row['kernels'].values())} | {kernels} | {row['bytes'] / 1e6:.1f} "
            f"| {row['floor'] / 1e6:.1f} | {row['eager_ops']} |"
        )
    lines += [
        "",
        "## Compiled resources",
        "",
        "Registers per thread on " + ", ".join(f"sm_{sm}" for sm in CAPABILITIES) + "; - if unused.",
        "The number of instructions that use local memory (spills) follows in brackets. Shared memory is the",
        "maximum over the GPUs, in KiB. wgmma: instructions on sm_90. Bold: hot kernels, which must not",
        "spill.",
        "",
        "| case | registers | shared | wgmma |",
        "|---|---|---|---|",
    ]
    for name, entry in report["cases"].items():
        resources = {sm: Resources(*numbers) for sm, numbers in entry["resources"].items()}
        registers = " / ".join(_registers(resources.get(str(sm))) for sm in CAPABILITIES)
        shared = max((one.shared for one in resources.values()), default=0) / 1024
        wgmma = resources["90"].hgmma if "90" in resources else "-"
        title = f"**{name}**" if entry["hot"] else name
        lines.append(f"| {title} | {registers} | {shared:.1f} | {wgmma} |")
    return "\n".join(lines) + "\n"


def _registers(used: Resources | None) -> str:
    if used is None:
        return "-"
    return f"{used.registers} ({used.spills})" if used.stack else str(used.registers)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing.compile_report", description=__doc__.splitlines()[0]
    )
    parser.parse_args()
    write(JSON.with_suffix(".md"), as_text(update(count_launches())))


if __name__ == "__main__":
    main()
