"""Choosing the device and the dtype of a command, from what this machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="auto (default): bf16 on a device that computes in it, fp32 elsewhere",
    )


def choose_device(name: str, kinds: tuple[str, ...] = ("cpu", "cuda", "mps")) -> torch.device:
    """ "auto" | "cpu" | "cuda" | "cuda:N" | "mps" -> the device; ValueError if it is none of `kinds` or does
    not exist here."""
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
                f"--device: {name} asked for, but torch {torch.__version__} sees {count} CUDA device(s)"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device: mps asked for, but torch {torch.__version__} sees no Apple GPU")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """A key of DTYPES, or "auto": bfloat16 where the device has instructions for it, else float32."""
    import torch

    from dalle2_fast.ops import _build_info

    if name != "auto":
        return getattr(torch, DTYPES[name])
    if device.type == "cuda":
        # including_emulation=False: GPUs before Ampere compute bfloat16 in software
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _build_info.cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32
