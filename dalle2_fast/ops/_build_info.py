"""Versions, backends and hardware of this installation."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from dalle2_fast.ops import _dispatch, _native

KERNELS = ("group_norm_silu", "cross_attention", "diffusion_step", "add_noise", "sample_noise")  # in Triton
CPU_KERNELS = (  # in dalle2_fast._C
    "group_norm_silu", "cross_attention", "conv3x3", "diffusion_step", "add_noise", "sample_noise",
)  # fmt: skip
LOSSES = ("contrastive_loss", "soft_contrastive_loss", "sigmoid_loss")  # in dalle2_fast._C


def build_info() -> dict[str, object]:
    """Versions and backends of this installation, as a JSON-able dict.

    Returns:
        A dict with these keys:

        - `dalle2_fast`, `python`, `platform`, `torch`: versions.
        - `triton`: its version, or None where it is not installed.
        - `cuda`: the CUDA version that torch was built with, or None.
        - `devices`: names of the GPUs that torch can use.
        - `cpu_threads`: number of threads of torch.
        - `native_extension`: whether `dalle2_fast._C` is installed and loads.
        - `native`: how it was built (`compiler`, `cuda`, `why_no_cuda`, `targets`), or None.
        - `why_no_native`: why it is not usable, or None.
        - `cpu_instructions`: the vector instructions that the native module uses on this CPU: "AVX-512 with
            BF16", "AVX-512", "AVX2" or "portable"; None without the module.
        - `kernels`: names of the ops that have a Triton kernel.
        - `cpu_kernels`: names of the ops that have a kernel for the CPU, in the native module.
        - `fused_ops`: names of the ops that impl="auto" runs fused on this machine: on its first GPU, or on
            the CPU. On the CPU the losses run fused from 2^22 logits on.
        - `why_not_fused`: why no kernel runs on this machine, or None.

    Example:
        >>> from dalle2_fast import build_info
        >>> build_info()["kernels"]
        ['group_norm_silu', 'cross_attention', 'diffusion_step', 'add_noise', 'sample_noise']
    """
    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    device = torch.device("cuda" if devices else "cpu", 0)
    reason, has_losses = _why_not_fused(device), _dispatch.load_native(device) is None
    native, why_no_native = _native.describe()
    fused = KERNELS if devices else CPU_KERNELS
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
        "cpu_instructions": None if native is None else _cpu_instructions(),
        "kernels": list(KERNELS),
        "cpu_kernels": list(CPU_KERNELS),
        "fused_ops": [*(fused if reason is None else ()), *(LOSSES if has_losses else ())],
        "why_not_fused": reason,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_instructions() -> str:
    from dalle2_fast import _C

    return _C.cpu.instruction_set()


def _why_not_fused(device: torch.device) -> str | None:
    """Why impl="auto" runs no kernel on this device, the machine's first GPU or its CPU."""
    if device.type == "cpu":
        return _native.describe()[1]
    if not _dispatch.HAS_TRITON:
        return "triton is not installed"
    return _dispatch.why_gpu_unsupported(device)


def cpu_has_bfloat16_units() -> bool:
    """Whether this CPU has matrix units for bfloat16 (AMX), as torch reports it.

    Without them the networks are slower in bfloat16 than in float32, whose convolutions need fewer products
    (Winograd): caption to four images took 2.0 times as long on an Intel Xeon with AVX512-BF16, and so did a
    training step of the decoder. An AVX2 machine, which emulates bfloat16, was 50 times slower.
    """
    if hasattr(torch.cpu, "get_capabilities"):  # public in newer versions of torch
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return torch.cpu._is_amx_tile_supported()
