"""Count the kernels that other packages' U-Nets launch before and after `dalle2_fast.patch`, without a GPU.

    python -m benchmarks.timing.launches_patched [NAME ...]    # writes results/launches_patched.json

The networks have their full size and run on tensors without data (FakeTensorMode), in bfloat16: the forward
pass without gradients, and the forward and backward pass. An op of PyTorch that makes or changes data counts
as one launch, even if CUDA needs several (native_group_norm), so "before" is a lower bound. For our ops, the
count is that of the kernels that their launchers launch at these shapes, configured for an H100. Rows whose
package is not installed keep their values in the file. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # so that the launchers of our ops run on the CPU

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.cases import foreign_unets
from benchmarks.cases.registry import installed
from benchmarks.cases.sizes import parameter_count
from benchmarks.timing.launch_counts import CountLaunches, allocated
from benchmarks.timing.provenance import RESULTS, commit, versions, write
from dalle2_fast.adapters.patch import patch, unpatch
from dalle2_fast.ops import _dispatch
from tests.support.launches import recorded

JSON = RESULTS / "launches_patched.json"
BATCH = 2  # one image with guidance


def launched(op, described: tuple) -> tuple[Counter, int]:
    """The kernels that one of our ops launches, and the number of PyTorch's ops around them."""
    with torch.no_grad(), recorded() as found, CountLaunches() as mode:
        op(*map(allocated, described))
    return Counter(launch.name for launch in found), mode.op_count


def count(run: Callable[[], object], fake: FakeTensorMode) -> dict:
    with fake, CountLaunches() as mode:
        run()
    kernels, around = Counter(), 0
    for (op, described), times in mode.ours.items():
        one, ops = launched(op, described)  # ops: copies that some launchers make
        around += times * ops
        for name in one:
            kernels[name] += times * one[name]
    total = mode.op_count + around + sum(kernels.values())
    norms = {name.removeprefix("aten::"): times for name, times in mode.ops.items() if "group_norm" in name}
    return dict(launches=total, of_ours=dict(sorted(kernels.items())), counted_once_each=norms)


def measure(name: str) -> dict:
    assert _dispatch.load_kernels(torch.device("cpu")) is None  # the kernels are loaded
    torch.set_default_dtype(torch.bfloat16)  # because a parameter without data cannot be cast
    with FakeTensorMode() as fake:
        net = foreign_unets.build(name).eval()
        given = foreign_unets.inputs(name, net, BATCH, dtype=torch.bfloat16)

    def forward() -> None:
        with torch.no_grad():
            foreign_unets.run(net, given)

    def both() -> None:
        foreign_unets.run(net, given).sum().backward()
        net.zero_grad()  # sets to None: launches nothing

    rows = {"forward": {}, "forward and backward": {}}
    for state in ("before", "after"):
        report = patch(net) if state == "after" else None
        for kind, run in (("forward", forward), ("forward and backward", both)):
            with mock.patch.object(_dispatch, "use_reference", lambda *_, **__: False):
                rows[kind][state] = count(run, fake)
    skipped = dict(report.skipped)
    unpatch(net)
    return dict(
        batch=BATCH, parameters=parameter_count(net), **rows, swapped=len(report.swapped), skipped=skipped,
        package=versions(foreign_unets.package(name).replace("_", "-")), commit=commit(),
        date=time.strftime("%Y-%m-%d"),
    )  # fmt: skip


def main(names: list[str]) -> None:
    report = json.loads(JSON.read_text()) if JSON.exists() else {"rows": {}}
    for name in names:
        if not installed(foreign_unets.package(name)):
            print(f"{name}: {foreign_unets.package(name)} is not installed", file=sys.stderr)
            continue
        report["rows"][name] = row = measure(name)
        write(JSON, json.dumps(report, indent=1) + "\n")
        for kind in ("forward", "forward and backward"):
            before, after = (row[kind][state]["launches"] for state in ("before", "after"))
            print(f"{name}, {kind}: {before} -> {after} ({after / before:.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing.launches_patched", description=__doc__.splitlines()[0]
    )
    names = ", ".join(foreign_unets.NAMES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {names}; default: all")
    chosen = parser.parse_args().names or list(foreign_unets.NAMES)
    if unknown := set(chosen) - set(foreign_unets.NAMES):
        parser.error(f"NAME: expected some of {names}, got {', '.join(unknown)}")
    main(chosen)
