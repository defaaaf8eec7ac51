"""What makes this machine slower than it could be, for `dalle2-fast info --check`: one sentence per fact."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def slow_because(
    device: torch.device, dtype: torch.dtype, info: Mapping[str, Any], *, fast_bfloat16: bool
) -> list[str]:
    """Why the pipeline is slow here, each with what helps.

    Args:
        device: where it runs.
        dtype: of the computation.
        info: as `build_info` gives it.
        fast_bfloat16: whether the device has matrix units for bfloat16.

    Returns:
        Sentences; none if nothing is known that would make it faster.
    """
    return [*(_on_a_cpu(dtype, info, fast_bfloat16) if device.type == "cpu" else _on_a_gpu(dtype, info))]


def _on_a_cpu(dtype: torch.dtype, info: Mapping[str, Any], fast_bfloat16: bool) -> Iterator[str]:
    if info["cuda"] is not None and not info["devices"]:
        yield (
            f"torch was built with CUDA {info['cuda']} and finds no GPU: does nvidia-smi find one, and is "
            "CUDA_VISIBLE_DEVICES set?"
        )
    elif info["devices"]:
        yield f"it runs on the CPU, and this machine has {', '.join(info['devices'])}: --device cuda"
    if not info["native_extension"]:
        yield (
            f"no native module ({info['why_no_native']}): the ops run as plain PyTorch; install a C++17 "
            "compiler and then dalle2_fast again"
        )
    elif info["cpu_instructions"] == "portable":
        yield "the native module runs portable instructions, because this CPU has neither AVX2 nor AVX-512"
    elif info["cpu_instructions"] == "AVX2":
        yield "the native module runs AVX2 instructions, because this CPU has no AVX-512"
    if str(dtype) != "torch.float32" and not fast_bfloat16:
        yield f"this CPU has no matrix units for {_name(dtype)}: --dtype fp32 is faster"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if info["cpu_threads"] < cores:
        yield f"torch runs {info['cpu_threads']} thread(s) on {cores} cores: is OMP_NUM_THREADS set?"
    if cores < 4:
        yield f"{cores} core(s): a network's time falls with their number"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores + info["cpu_threads"]:  # this program alone is one per thread
        yield f"other programs use this machine: {load:.1f} of them want its {cores} core(s)"
    if _large_pages() == "never":
        yield f"the system gives no pages of 2 MB: write madvise into {LARGE_PAGES}"


def _on_a_gpu(dtype: torch.dtype, info: Mapping[str, Any]) -> Iterator[str]:
    if info["why_not_fused"] is not None:
        yield f"no kernel runs on this GPU ({info['why_not_fused']}): the ops run as plain PyTorch"
    native = info["native"] or {}
    if not info["native_extension"]:
        yield f"no native module ({info['why_no_native']}): the losses of training run as plain PyTorch"
    elif native.get("why_no_cuda"):
        yield f"the native module has no CUDA part ({native['why_no_cuda']}): losses of training are slower"
    if str(dtype) == "torch.float32":
        yield "float32 on a GPU: --dtype bf16 needs half the memory traffic (fp16 before Ampere)"


def _large_pages() -> str | None:
    """The setting in brackets, "always [madvise] never"; None where there is no such file."""
    try:
        words = LARGE_PAGES.read_text().split()
    except OSError:
        return None
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
