"""What is available here, and whether given tensors can take the fused path."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch
from torch import Tensor

from dalle2_fast.ops import _native

KERNELS = ("group_norm_silu", "cross_attention", "diffusion_step", "add_noise", "sample_noise")
LOSSES = ("contrastive_loss", "soft_contrastive_loss", "sigmoid_loss")  # in dalle2_fast._C
# On the CPU, from this many logits on dalle2_fast._C is no slower than the reference up to D = 512: with one
# thread contrastive_loss takes 1.11 times as long for N = 1448, 0.98 for 2048, 0.85 for 4096 (one product of
# N^2 D more, and less traffic).
LEAST_LOGITS = 1 << 22
OLDEST_GPU = 8  # compute capability; below it no configuration of a kernel has been compiled
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_CHOICES = ("auto", "reference", "fused")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton settles on its interpreter, which runs kernels on CPU tensors for tests, when a kernel is defined.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_reference(impl: str, tensor: Tensor, *others: Tensor | None) -> bool:
    """Whether an op on these floating tensors, all on one device, runs as its reference; if not, its kernel
    is loaded. It runs before every op: about 1.5 us.

    "auto" asks for CUDA tensors of a supported dtype and GPU, and for Triton. "fused" raises RuntimeError
    where a kernel cannot run; in Triton's interpreter (TRITON_INTERPRET=1) it also takes tensors on the CPU.
    """
    if impl == "auto":
        if not tensor.is_cuda:
            return True
    elif impl != "fused":
        _check_choice(impl)
        return True
    obstacle = _dtype_obstacle(tensor, *others) or _device_obstacle(tensor.device)
    if obstacle is not None and impl == "fused":
        raise RuntimeError(f'impl="fused": {obstacle}; use impl="auto" or "reference"')
    return obstacle is not None


def use_native(impl: str, image: Tensor, text: Tensor) -> bool:
    """Whether a contrastive loss of image [n, D] and text [m, D], floating and on one device, runs in
    dalle2_fast._C, on the CPU or the GPU; if so, its ops are loaded.

    On the CPU "auto" leaves few logits to the reference, see LEAST_LOGITS. "fused" raises RuntimeError where
    dalle2_fast._C cannot run.
    """
    if impl == "auto":
        if image.device.type == "cpu" and image.shape[0] * text.shape[0] < LEAST_LOGITS:
            return False
    elif impl != "fused":
        _check_choice(impl)
        return False
    dtypes = (*DTYPES, torch.float64) if image.device.type == "cpu" else DTYPES
    obstacle = _dtype_obstacle(image, text, dtypes=dtypes) or _native_obstacle(image.device)
    if obstacle is not None and impl == "fused":
        raise RuntimeError(f'impl="fused": {obstacle}; use impl="auto" or "reference"')
    return obstacle is None


def needs_gradient(*values: Tensor | float | None) -> bool:
    """Whether autograd will ask for a gradient of one of these values."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _check_choice(impl: str) -> None:
    if impl not in _CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, _CHOICES))}, got {impl!r}")


def _dtype_obstacle(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"no kernel takes {tensor.dtype} (only {known})"
    return None


_native_obstacles: dict[torch.device, str | None] = {}  # what _ask_native answered


def _native_obstacle(device: torch.device) -> str | None:
    if torch.compiler.is_compiling():
        return _ask_native(device)
    if device not in _native_obstacles:
        _native_obstacles[device] = _ask_native(device)
    return _native_obstacles[device]


def _ask_native(device: torch.device) -> str | None:
    """Why dalle2_fast._C cannot run on this device. Where it can, its ops are loaded."""
    if device.type not in ("cpu", "cuda"):
        return f"no kernel runs on device {device.type}"
    if _native.ABSENT is not None:
        return _native.ABSENT
    from dalle2_fast import _C

    if device.type == "cuda":
        if not hasattr(_C, "cuda"):
            return "the native module dalle2_fast._C was built without CUDA"
        obstacle = _ask_gpu(device)
        if obstacle is not None:
            return obstacle
    import dalle2_fast.kernels.contrastive.loss  # noqa: F401

    return None


_obstacles: dict[torch.device, str | None] = {}  # what _ask answered


def _device_obstacle(device: torch.device) -> str | None:
    """Why no kernel can run on this device. Where one can, the kernels are loaded."""
    if torch.compiler.is_compiling():  # no look-up that torch.compile would guard and recompile on
        return _ask(device)
    if device not in _obstacles:
        _obstacles[device] = _ask(device)
    return _obstacles[device]


def _ask(device: torch.device) -> str | None:
    if not _HAS_TRITON:
        return "the kernels need the package triton, which is not installed"
    if device.type == "cuda":
        obstacle = _ask_gpu(device)
        if obstacle is not None:
            return obstacle
    elif device.type != "cpu":
        return f"no kernel runs on device {device.type}"
    elif not _INTERPRETED:
        hint = "TRITON_INTERPRET=1, set before dalle2_fast is imported, interprets them on the CPU"
        return f"no kernel runs on device cpu; {hint}"
    # Statements, not importlib: torch.compile can trace them.
    import dalle2_fast.kernels.cross_attention.forward
    import dalle2_fast.kernels.diffusion.noise
    import dalle2_fast.kernels.diffusion.step
    import dalle2_fast.kernels.group_norm_silu.forward  # noqa: F401

    return None


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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _reason_for_references() -> str | None:
    """Why impl="auto" runs no kernel on this machine's first GPU."""
    return _ask_gpu(torch.device("cuda", 0)) if _HAS_TRITON else "triton is not installed"


def build_info() -> dict[str, object]:
    """Versions and backends of this installation, as a JSON-able dict.

    Keys: `dalle2_fast`, `python`, `platform`, `torch`, `triton` (None when not installed), `cuda` (the
    version that torch was built with, or None), `devices` (names of the GPUs that torch can use),
    `cpu_threads`, `native_extension` (whether `dalle2_fast._C` is there and loads), `native` (how it was
    built: `compiler`, `cuda`, `why_no_cuda`, `targets`; or None), `why_no_native` (or None), `kernels` (names
    of the ops that have a Triton kernel), `fused_ops` (those that impl="auto" runs fused on this machine, the
    losses on the CPU from LEAST_LOGITS on) and `why_not_fused` (why no Triton kernel does, or None).
    """
    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    reason = _reason_for_references()
    losses = LOSSES if _ask_native(torch.device("cuda" if devices else "cpu", 0)) is None else ()
    native, why_no_native = _native.describe()
    return {
        "dalle2_fast": _version("dalle2_fast"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "devices": devices,
        "cpu_threads": torch.get_num_threads(),
        "native_extension": native is not None,
        "native": native,
        "why_no_native": why_no_native,
        "kernels": list(KERNELS),
        "fused_ops": [*(KERNELS if reason is None else ()), *losses],
        "why_not_fused": reason,
    }


def cpu_has_bfloat16() -> bool:
    """Whether this x86 CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), as torch reports it.

    Elsewhere torch emulates it: measured 50 times slower than float32 on an AVX2 machine.
    """
    if hasattr(torch.cpu, "get_capabilities"):  # public in newer versions of torch
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
