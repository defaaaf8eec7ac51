"""Options of the benchmarks, the description of the machine, and the table at the end of a run."""

from __future__ import annotations

import subprocess

import pytest
import torch

RIVALS = ("triton", "open_clip_torch", "inf-cl", "liger-kernel", "apex", "sglang", "vllm-omni", "diffusers",
          "transformers", "dalle2-pytorch", "torchvision", "openvino", "onnxruntime")  # fmt: skip


def pytest_addoption(parser):
    group = parser.getgroup("dalle2_fast")
    group.addoption("--quick", action="store_true", help="every row once with few rounds, 8 minutes at most")
    group.addoption("--threads", type=int, help="threads of a CPU; default: torch's choice")
    group.addoption("--minutes", type=float, help="no row begins later; default: no limit, 8 with --quick")
    group.addoption("--note", default="", help="kept in the results, e.g. other load on the machine")


def pytest_configure(config):
    if threads := config.getoption("threads", None):
        if threads < 1:
            raise pytest.UsageError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    from benchmarks.cases import registry
    from dalle2_fast import keep_freed_memory

    keep_freed_memory()  # as the command line does; rivals profit as much
    registry.QUICK = config.getoption("quick", False)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    from benchmarks.timing.provenance import machine, versions

    machine_info["dalle2_fast"] = machine() | {
        "versions": versions(*RIVALS),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver_and_clocks": _nvidia_smi(),
        "quick": config.getoption("quick"),
        "note": config.getoption("note"),
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Adds the rows that were not timed, which pytest-benchmark does not write."""
    from benchmarks.timing.rows import ROWS

    output_json["dalle2_fast_absent"] = [row.to_json() for row in ROWS if row.absent]


def _nvidia_smi() -> dict | None:
    names = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit"]
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(names, map(str.strip, done.stdout.split(",")), strict=False))


def pytest_terminal_summary(terminalreporter):
    from benchmarks.timing.rows import ROWS

    if not ROWS:
        return
    terminalreporter.section("dalle2_fast")
    heads = ("case", "implementation", "us", "spread", "GB/s", "GFLOP/s", "images/s", "of ceiling", "peak MB",
             "speed-up")  # fmt: skip
    line = "{:<50}{:<26}{:>11}{:>8}{:>8}{:>10}{:>10}{:>12}{:>9}{:>10}"
    terminalreporter.write_line(line.format(*heads))
    for row in sorted(ROWS, key=lambda row: bool(row.absent)):
        if row.absent:
            terminalreporter.write_line(f"{row.case:<50}{row.implementation:<26}absent: {row.absent}")
            continue
        terminalreporter.write_line(
            line.format(
                row.case, row.implementation, f"{row.seconds * 1e6:.1f}", f"{row.spread:.0%}",
                f"{row.bytes_per_second / 1e9:.0f}", f"{row.flops_per_second / 1e9:.0f}",
                f"{row.images_per_second:.3g}" if row.images_per_second else "", f"{row.share_of_best:.0%}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
                "" if row.ours_is_faster is None else f"{row.ours_is_faster:.2f}x",
            )
        )  # fmt: skip
