"""The device and the dtype of a command, from its options and from what this machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def choose_device(name: str, kinds: tuple[str, ...] = ("cpu", "cuda", "mps")) -> torch.device:
    """The device that --device names.

    Args:
        name: "auto" (a GPU if there is one, else the CPU), "cpu", "cuda", "cuda:N" or "mps".
        kinds: the device types that the command supports.

    Raises:
        ValueError: a device of no such type, or one that this machine does not have.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    import torch

    wrong = ValueError(f"--device: expected auto, {', '.join(kinds)} or cuda:N, got {name!r}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise wrong from None
    if device.type not in kinds:
        raise wrong
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"--device: expected a device of this machine, got {name}, but torch {torch.__version__} "
                f"finds {count} CUDA device(s)"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"--device: expected a device of this machine, got mps, but torch {torch.__version__} finds no "
            "Apple GPU"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that --dtype names.

    Args:
        name: a key of DTYPES, or "auto": bfloat16 where the device has instructions for it, else float32.
        device: where it is to be used.
    """
    import torch

    from dalle2_fast.ops._build_info import cpu_has_bfloat16

    if name != "auto":
        return getattr(torch, DTYPES[name])
    if device.type == "cuda":
        # including_emulation=False: GPUs before Ampere compute bfloat16 in software
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32
