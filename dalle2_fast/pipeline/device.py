"""The device and the dtype of a pipeline, from what is asked for and from what this machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def choose_device(
    name: str | torch.device,
    kinds: tuple[str, ...] = ("cpu", "cuda", "mps"),
    argument: str = "--device",
) -> torch.device:
    """The device that `name` stands for.

    Args:
        name: "auto" (a GPU if there is one, else the CPU), "cpu", "cuda", "cuda:N" or "mps"; or a
            torch.device.
        kinds: the device types that the caller supports.
        argument: what an error message calls it.

    Raises:
        TypeError: `name` is neither a string nor a device.
        ValueError: a device of no such type, or one that this machine does not have.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    import torch

    wrong = f"{argument}: expected auto, {', '.join(kinds)} or cuda:N, got {str(name)!r}"
    if not isinstance(name, (str, torch.device)):
        raise TypeError(wrong)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(wrong) from None
    if device.type not in kinds:
        raise ValueError(wrong)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"{argument}: expected a device of this machine, got {name}, but torch {torch.__version__} "
                f"finds {count} CUDA device(s)"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"{argument}: expected a device of this machine, got mps, but torch {torch.__version__} finds no "
            "Apple GPU"
        )
    return device


def choose_dtype(
    name: str | torch.dtype, device: torch.device | str, argument: str = "--dtype"
) -> torch.dtype:
    """The dtype that `name` stands for.

    Args:
        name: a key of DTYPES; or "auto": bfloat16 where the device is fast in it (a CPU with AMX, a GPU since
            Ampere), else float32; or a floating-point torch.dtype.
        device: where it is to be used, not necessarily the current GPU.
        argument: what an error message calls it.

    Raises:
        TypeError: `name` is neither a string nor a dtype.
        ValueError: another string, or a dtype that is not of floating point.

    Example:
        >>> choose_dtype("fp16", "cpu")
        torch.float16
    """
    import torch

    from dalle2_fast.ops._build_info import cpu_has_bfloat16_units

    wrong = f"{argument}: expected auto, {', '.join(DTYPES)} or a floating-point torch.dtype, got {name!r}"
    if isinstance(name, torch.dtype):
        if not name.is_floating_point:
            raise ValueError(wrong)
        return name
    if not isinstance(name, str):
        raise TypeError(wrong)
    if name in DTYPES:
        return getattr(torch, DTYPES[name])
    if name != "auto":
        raise ValueError(wrong)
    device = torch.device(device)
    if device.type == "cuda":  # CUDA GPUs before Ampere (8.0) compute bfloat16 in software
        fast = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and cpu_has_bfloat16_units()
    return torch.bfloat16 if fast else torch.float32
