"""What is available here, and whether given tensors can take the fused path."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch
from torch import Tensor

_CHOICES = ("auto", "reference", "fused")


def use_reference(impl: str, *tensors: Tensor | None) -> bool:
    """Whether an op on `tensors` runs as its reference. Raises where impl="fused" cannot be served."""
    if impl not in _CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, _CHOICES))}, got {impl!r}")
    if impl == "fused":
        raise RuntimeError(
            'impl="fused": this version of dalle2_fast has no fused kernels; use impl="auto" or "reference"'
        )
    return True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def build_info() -> dict[str, object]:
    """Versions and backends of this installation, as a JSON-able dict.

    Keys: `dalle2_fast`, `python`, `platform`, `torch`, `triton` (None when not installed), `cuda` (the
    version that torch was built with, or None), `devices` (names of the GPUs that torch can use),
    `cpu_threads`, `native_extension` (whether `dalle2_fast._C` is installed) and `fused_ops` (names; empty:
    every op runs as its reference).
    """
    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "dalle2_fast": _version("dalle2_fast"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "devices": devices,
        "cpu_threads": torch.get_num_threads(),
        "native_extension": importlib.util.find_spec("dalle2_fast._C") is not None,
        "fused_ops": [],
    }
