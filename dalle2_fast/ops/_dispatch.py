"""The choice between an op's reference and its fused form, by device, dtype and what is installed."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from dalle2_fast.ops import _native

# On the CPU, from this many logits on dalle2_fast._C is no slower than the reference up to D = 512: with one
# thread contrastive_loss takes 1.11 times as long for N = 1448, 0.98 for 2048, 0.85 for 4096 (one product of
# N^2 D more, and less traffic).
MIN_FUSED_LOGITS = 1 << 22
MIN_COMPUTE_CAPABILITY = 8  # below it no configuration of a kernel has been compiled
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_CHOICES = ("auto", "reference", "fused")
HAS_TRITON = importlib.util.find_spec("triton") is not None
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
    reason = _why_dtype_unsupported(tensor, *others) or _why_no_kernels(tensor.device)
    if reason is not None and impl == "fused":
        raise RuntimeError(f'impl="fused": {reason}; use impl="auto" or "reference"')
    return reason is not None


def use_native(impl: str, image: Tensor, text: Tensor) -> bool:
    """Whether a contrastive loss of image [n, D] and text [m, D], floating and on one device, runs in
    dalle2_fast._C, on the CPU or the GPU; if so, its ops are loaded.

    On the CPU "auto" leaves few logits to the reference, see MIN_FUSED_LOGITS. "fused" raises RuntimeError
    where dalle2_fast._C cannot run.
    """
    if impl == "auto":
        if image.device.type == "cpu" and image.shape[0] * text.shape[0] < MIN_FUSED_LOGITS:
            return False
    elif impl != "fused":
        _check_choice(impl)
        return False
    dtypes = (*DTYPES, torch.float64) if image.device.type == "cpu" else DTYPES
    reason = _why_dtype_unsupported(image, text, dtypes=dtypes) or _why_no_native(image.device)
    if reason is not None and impl == "fused":
        raise RuntimeError(f'impl="fused": {reason}; use impl="auto" or "reference"')
    return reason is None


def needs_gradient(*values: Tensor | float | None) -> bool:
    """Whether autograd will ask for a gradient of one of these values."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _check_choice(impl: str) -> None:
    if impl not in _CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, _CHOICES))}, got {impl!r}")


def _why_dtype_unsupported(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"no kernel takes {tensor.dtype} (only {known})"
    return None


# --------------------------------------------------------------------------------------------- Triton kernels

_kernel_answers: dict[torch.device, str | None] = {}  # what load_kernels answered


def _why_no_kernels(device: torch.device) -> str | None:
    if torch.compiler.is_compiling():  # no look-up that torch.compile would guard and recompile on
        return load_kernels(device)
    if device not in _kernel_answers:
        _kernel_answers[device] = load_kernels(device)
    return _kernel_answers[device]


def load_kernels(device: torch.device) -> str | None:
    """Load the Triton kernels; return None, or why they cannot run on this device. Then nothing is loaded."""
    if not HAS_TRITON:
        return "the kernels need the package triton, which is not installed"
    if device.type == "cuda":
        reason = why_gpu_unsupported(device)
        if reason is not None:
            return reason
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


def why_gpu_unsupported(device: torch.device) -> str | None:
    if torch.version.cuda is None:
        return "the kernels are for NVIDIA GPUs and a torch built with CUDA"
    if not torch.cuda.is_available():  # a tensor of FakeTensorMode
        return "there is no CUDA device"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < MIN_COMPUTE_CAPABILITY:
        came = f"{properties.major}.{properties.minor}"
        return f"the kernels need compute capability {MIN_COMPUTE_CAPABILITY}.0, {properties.name} has {came}"
    return None


# ------------------------------------------------------------------------------------------ dalle2_fast._C

_native_answers: dict[torch.device, str | None] = {}  # what load_native answered


def _why_no_native(device: torch.device) -> str | None:
    if torch.compiler.is_compiling():
        return load_native(device)
    if device not in _native_answers:
        _native_answers[device] = load_native(device)
    return _native_answers[device]


def load_native(device: torch.device) -> str | None:
    """Load the ops of dalle2_fast._C. Returns None, or why they cannot run on this device."""
    if device.type not in ("cpu", "cuda"):
        return f"no kernel runs on device {device.type}"
    if _native.WHY_ABSENT is not None:
        return _native.WHY_ABSENT
    from dalle2_fast import _C

    if device.type == "cuda":
        if not hasattr(_C, "cuda"):
            return "the native module dalle2_fast._C was built without CUDA"
        reason = why_gpu_unsupported(device)
        if reason is not None:
            return reason
    import dalle2_fast.kernels.contrastive.loss  # noqa: F401

    return None
