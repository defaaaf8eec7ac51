"""The choice between an op's reference and its fused form, by device, dtype and what is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_fast.ops import _native
from dalle2_fast.ops._dtypes import is_forward_mode_alone, is_transformed

# With at least this many logits dalle2_fast._C is not slower than the reference on the CPU, up to D = 512.
# With one thread contrastive_loss takes 1.11 times as long for N = 1448, 0.98 for 2048 and 0.85 for 4096: it
# computes one product of N^2 D more, and moves less memory.
MIN_FUSED_LOGITS = 1 << 22
MIN_COMPUTE_CAPABILITY = 8  # the tests compile no kernel for older GPUs
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_CHOICES = ("auto", "reference", "fused")
HAS_TRITON = importlib.util.find_spec("triton") is not None
# The interpreter runs kernels on CPU tensors, for tests. Triton chooses it when a kernel is defined, so a
# later change of the variable has no effect.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_reference(
    impl: str, tensor: Tensor, *others: Tensor | None, on_cpu: bool = True, forward_mode: bool = False
) -> bool:
    """Whether an op on these floating tensors runs as its reference. If not, its kernel is loaded.

    It runs before every op and takes about 1.5 us. All tensors are on one device. "auto" takes the kernel of
    Triton for CUDA tensors and that of dalle2_fast._C for tensors on the CPU, if the op has one (`on_cpu`),
    where it is installed, supports the dtype and the device, and `is_transformed` is False. "fused" raises
    RuntimeError where a kernel cannot run. In Triton's interpreter (TRITON_INTERPRET=1), "fused" takes the
    kernels of Triton on the CPU, and "auto" the references.

    forward_mode: the kernel has a tangent. It then also runs under one level of forward mode, by `kernel`.
    """
    if impl == "auto":
        if not tensor.is_cuda and (_INTERPRETED or not on_cpu or tensor.device.type != "cpu"):
            return True
    elif impl != "fused":
        _check_choice(impl)
        return True
    reason = _why_dtype_unsupported(tensor, *others) or _why_no_kernels(tensor.device)
    reason = reason or _why_no_rule(forward_mode)
    if reason is None and not tensor.is_cuda:
        if _INTERPRETED:
            reason = _why_not_interpreted(tensor, *others)
        elif not on_cpu:
            reason = f"the op has no kernel for the CPU; {_INTERPRETER_HINT}"
    if reason is not None and impl == "fused":
        raise RuntimeError(f'impl="fused": {reason}; use impl="auto" or "reference"')
    return reason is not None


def is_native(tensor: Tensor) -> bool:
    """Whether the kernel of this tensor's device is in dalle2_fast._C, and not Triton's."""
    return tensor.device.type == "cpu" and not _INTERPRETED


def use_reference_of_cpu_op(impl: str, *tensors: Tensor | None) -> bool:
    """`use_reference` for conv3x3, whose only kernel is for float32 and bfloat16 on the CPU."""
    if impl not in ("auto", "fused"):
        _check_choice(impl)
        return True
    reason = _why_dtype_unsupported(*tensors, dtypes=(torch.float32, torch.bfloat16))
    reason = reason or _why_no_cpu_kernels(tensors[0]) or _why_no_rule()
    if reason is None and tensors[0].dtype == torch.bfloat16:
        from dalle2_fast.kernels.convolution.native import WHY_NO_BFLOAT16

        reason = WHY_NO_BFLOAT16
    if reason is not None and impl == "fused":
        raise RuntimeError(f'impl="fused": {reason}; use impl="auto" or "reference"')
    return reason is not None


def use_native(impl: str, image: Tensor, text: Tensor) -> bool:
    """Whether a contrastive loss of image [n, D] and text [m, D] runs in dalle2_fast._C.

    If so, its ops are loaded. Both tensors are floating and on one device, the CPU or a GPU. On the CPU
    "auto" takes the reference below MIN_FUSED_LOGITS logits, and on every device where `is_transformed`.
    "fused" raises RuntimeError where dalle2_fast._C cannot run.
    """
    if impl == "auto":
        if image.device.type == "cpu" and image.shape[0] * text.shape[0] < MIN_FUSED_LOGITS:
            return False
    elif impl != "fused":
        _check_choice(impl)
        return False
    dtypes = (*DTYPES, torch.float64) if image.device.type == "cpu" else DTYPES
    reason = _why_dtype_unsupported(image, text, dtypes=dtypes) or _why_no_native(image.device)
    reason = reason or _why_no_rule()
    if reason is not None and impl == "fused":
        raise RuntimeError(f'impl="fused": {reason}; use impl="auto" or "reference"')
    return reason is None


def needs_gradient(*values: Tensor | float | None) -> bool:
    """Whether autograd will ask for a gradient of one of these values."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def kernel(name: str) -> Callable:
    """The op of this name. While forward mode is active, it is in the form that has a tangent."""
    if is_transformed():
        from dalle2_fast.kernels._op import forward_mode

        return forward_mode[name]
    return getattr(torch.ops.dalle2_fast, name)


def _why_no_rule(forward_mode: bool = False) -> str | None:
    if not is_transformed():
        return None
    if not forward_mode:
        return "this kernel has no rule for forward-mode derivatives and torch.func (grad, jvp, vmap, ...)"
    if torch.compiler.is_compiling():  # torch.compile cannot trace a tangent of our own
        return "this kernel has no rule for forward-mode derivatives inside of torch.compile"
    if not is_forward_mode_alone():
        return (
            "this kernel has a rule for one level of forward mode (jvp), and none for other transforms of "
            "torch.func (grad, vmap, ...)"
        )
    return None


def _check_choice(impl: str) -> None:
    if impl not in _CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, _CHOICES))}, got {impl!r}")


def _why_dtype_unsupported(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"no kernel takes {tensor.dtype} (only {known})"
    return None


# -------------------------------------------------------------------------- kernels: Triton, or _C on the CPU

_INTERPRETER_HINT = "TRITON_INTERPRET=1, set before dalle2_fast is imported, interprets Triton's kernels"
_kernel_answers: dict[torch.device, str | None] = {}  # results of load_kernels


def _why_no_kernels(device: torch.device) -> str | None:
    if torch.compiler.is_compiling():  # a look-up in the dictionary would become a guard, and recompile
        return load_kernels(device)
    if device not in _kernel_answers:
        _kernel_answers[device] = load_kernels(device)
    return _kernel_answers[device]


def load_kernels(device: torch.device) -> str | None:
    """Load the kernels for this device and return None, or load nothing and return why none runs on it."""
    if device.type not in ("cpu", "cuda"):
        return f"no kernel runs on device {device.type}"
    if device.type == "cpu" and not _INTERPRETED:
        return _load_cpu_kernels()
    if not HAS_TRITON:
        return "the kernels need the package triton, which is not installed"
    if device.type == "cuda":
        reason = why_gpu_unsupported(device)
        if reason is not None:
            return reason
    # torch.compile can trace import statements, but not importlib.
    import dalle2_fast.kernels.cross_attention.tangent
    import dalle2_fast.kernels.diffusion.noise
    import dalle2_fast.kernels.diffusion.step
    import dalle2_fast.kernels.group_norm_silu.forward  # noqa: F401

    return None


def _why_no_cpu_kernels(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return f"the op has a kernel for the CPU only, not for device {tensor.device.type}"
    if _INTERPRETED:
        return "Triton's interpreter has no kernel of this op"
    return _why_no_kernels(tensor.device)


def _load_cpu_kernels() -> str | None:
    if _native.WHY_ABSENT is not None:
        return _native.WHY_ABSENT
    import dalle2_fast.kernels.convolution.native
    import dalle2_fast.kernels.cross_attention.native
    import dalle2_fast.kernels.diffusion.native
    import dalle2_fast.kernels.group_norm_silu.native  # noqa: F401

    return None


def _why_not_interpreted(*tensors: Tensor | None) -> str | None:
    if any(tensor is not None and tensor.dtype == torch.bfloat16 for tensor in tensors):
        from dalle2_fast.kernels._interpreter import has_bfloat16

        if not has_bfloat16():
            return "Triton's interpreter computes bfloat16 wrongly (float32 and float16 are right)"
    return None


def why_gpu_unsupported(device: torch.device) -> str | None:
    if torch.version.cuda is None:
        return "the kernels are for NVIDIA GPUs and a torch built with CUDA"
    if not torch.cuda.is_available():  # a tensor of FakeTensorMode may still be on a CUDA device
        return "there is no CUDA device"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < MIN_COMPUTE_CAPABILITY:
        came = f"{properties.major}.{properties.minor}"
        return f"the kernels need compute capability {MIN_COMPUTE_CAPABILITY}.0, {properties.name} has {came}"
    return None


# ------------------------------------------------------------------------------------------ dalle2_fast._C

_native_answers: dict[torch.device, str | None] = {}  # results of load_native


def _why_no_native(device: torch.device) -> str | None:
    if torch.compiler.is_compiling():
        return load_native(device)
    if device not in _native_answers:
        _native_answers[device] = load_native(device)
    return _native_answers[device]


def load_native(device: torch.device) -> str | None:
    """Load the ops of dalle2_fast._C and return None, or return why they cannot run on this device."""
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
    import dalle2_fast.kernels.contrastive.clip
    import dalle2_fast.kernels.contrastive.sigmoid
    import dalle2_fast.kernels.contrastive.soft  # noqa: F401

    return None
