"""What is available here, and whether given tensors can take the fused path."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch
from torch import Tensor

KERNELS = ("group_norm_silu", "cross_attention", "diffusion_step", "add_noise", "sample_noise")
OLDEST_GPU = 8  # compute capability; below it no configuration of a kernel has been compiled
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_CHOICES = ("auto", "reference", "fused")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton settles on its interpreter, which runs kernels on CPU tensors for tests, when a kernel is defined.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_reference(impl: str, *tensors: Tensor | None) -> bool:
    """Whether an op on `tensors` (the floating ones) runs as its reference; if not, its kernel is loaded.

    "auto" asks for CUDA tensors of a supported dtype and GPU, and for Triton. "fused" raises RuntimeError
    where a kernel cannot run; in Triton's interpreter (TRITON_INTERPRET=1) it also takes tensors on the CPU.
    """
    if impl == "auto":
        for tensor in tensors:
            if tensor is not None and not (tensor.is_cuda and _obstacle(tensor) is None):
                return True
    elif impl == "fused":
        for tensor in tensors:
            obstacle = None if tensor is None else _obstacle(tensor)
            if obstacle is not None:
                raise RuntimeError(f'impl="fused": {obstacle}; use impl="auto" or "reference"')
    else:
        _check_choice(impl)
        return True
    _load_kernels()
    return False


def only_reference(impl: str, op: str) -> None:
    """For an op that has no kernel: raises on impl="fused"."""
    _check_choice(impl)
    if impl == "fused":
        raise RuntimeError(f'impl="fused": {op} has no fused kernel; use impl="auto" or "reference"')


def _check_choice(impl: str) -> None:
    if impl not in _CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, _CHOICES))}, got {impl!r}")


def _obstacle(tensor: Tensor) -> str | None:
    """Why no kernel can run on this tensor."""
    if not _HAS_TRITON:
        return "the kernels need the package triton, which is not installed"
    if tensor.dtype not in DTYPES:
        return f"no kernel takes {tensor.dtype} (only float32, float16, bfloat16)"
    device = tensor.device
    if device.type == "cuda":
        return _gpu_obstacle(device)
    if device.type == "cpu" and _INTERPRETED:
        return None
    hint = "; TRITON_INTERPRET=1, set before dalle2_fast is imported, interprets them on the CPU"
    return f"no kernel runs on device {device.type}{hint if device.type == 'cpu' else ''}"


_gpu_obstacles: dict[int, str | None] = {}  # by device index: asking torch costs microseconds a call


def _gpu_obstacle(device: torch.device) -> str | None:
    if torch.compiler.is_compiling():  # no look-up that torch.compile would guard and recompile on
        return _ask_gpu(device)
    if device.index not in _gpu_obstacles:
        _gpu_obstacles[device.index] = _ask_gpu(device)
    return _gpu_obstacles[device.index]


def _ask_gpu(device: torch.device) -> str | None:
    if torch.version.cuda is None:
        return "the kernels are for NVIDIA GPUs and a torch built with CUDA"
    if not torch.cuda.is_available():  # a tensor of FakeTensorMode
        return "there is no CUDA device"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < OLDEST_GPU:
        had = f"{properties.major}.{properties.minor}"
        return f"the kernels need compute capability {OLDEST_GPU}.0, {properties.name} has {had}"
    return None


def _load_kernels() -> None:
    """Import the kernels, which registers their ops. Statements, because torch.compile can trace them; an
    import repeated costs 0.1 us."""
    import dalle2_fast.kernels.add_noise
    import dalle2_fast.kernels.cross_attention
    import dalle2_fast.kernels.diffusion_step
    import dalle2_fast.kernels.group_norm_silu  # noqa: F401


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _reason_for_references() -> str | None:
    """Why impl="auto" runs no kernel on this machine's first GPU."""
    if not _HAS_TRITON:
        return "triton is not installed"
    return _ask_gpu(torch.device("cuda", 0))


def build_info() -> dict[str, object]:
    """Versions and backends of this installation, as a JSON-able dict.

    Keys: `dalle2_fast`, `python`, `platform`, `torch`, `triton` (None when not installed), `cuda` (the
    version that torch was built with, or None), `devices` (names of the GPUs that torch can use),
    `cpu_threads`, `native_extension` (whether `dalle2_fast._C` is installed), `kernels` (names of the ops
    that have a fused kernel), `fused_ops` (those that impl="auto" runs fused on this machine) and
    `why_not_fused` (why there are none, or None).
    """
    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    reason = _reason_for_references()
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
        "kernels": list(KERNELS),
        "fused_ops": list(KERNELS) if reason is None else [],
        "why_not_fused": reason,
    }
