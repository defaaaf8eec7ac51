"""Checks of arguments that several ops share. They are the same on every backend and run before any work.

A wrong type or dtype is a TypeError; a wrong shape, value or device is a ValueError. Each message names the
argument, what was expected (for a shape its letters and its numbers) and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor


def tensor(name: str, value: object) -> None:
    """A tensor with strides: neither sparse, nor nested, nor one of oneDNN's."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        came = "a nested one" if value.is_nested else f"the layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor (layout torch.strided), got {came}")


def floating(name: str, value: Tensor) -> None:
    tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")


def real(name: str, value: Tensor) -> None:
    """A floating-point or an integer tensor."""
    tensor(name, value)
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected a tensor of real numbers, got {value.dtype}")


def flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def shape(name: str, value: Tensor, letters: str, expected: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected [{letters}] = {tuple(expected)}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} (that of {other_name}), got {value.device}")


def finite_number(name: str, value: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # torch.compile cannot trace isfinite of a symbolic float
        raise ValueError(f"{name}: expected a finite number, got {value}")


def positive_number(name: str, value: float) -> None:
    finite_number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def device(name: str, value: torch.device | str) -> torch.device:
    """The device itself, where torch knows its name."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: expected a torch.device or its name, got {value!r}") from error


def seeds(name: str, value: Tensor, batch: int) -> None:
    tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {value.dtype}")
    shape(name, value, "B", (batch,))


def seeds_and_step(values: Tensor, step: int | Tensor, batch: int) -> None:
    seeds("seeds", values, batch)
    step_index(step, values)


def step_index(step: int | Tensor, like: Tensor, length: int | None = None) -> None:
    """An int, or an int64 scalar tensor on the device of `like`. length: rows of the indexed table."""
    if isinstance(step, Tensor):
        tensor("step", step)
        if step.dtype != torch.int64:
            raise TypeError(f"step: expected torch.int64, got {step.dtype}")
        if step.numel() != 1:
            raise ValueError(f"step: expected a scalar, got {tuple(step.shape)}")
        if step.device != like.device:
            raise ValueError(f"step: expected device {like.device}, got {step.device}")
        return
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step: expected an int or an int64 scalar tensor, got {type(step).__name__}")
    if step < 0 or step >= (2**63 if length is None else length):
        expected = "0 <= step < 2**63" if length is None else f"0 <= step < {length} (the rows of table)"
        raise ValueError(f"step: expected {expected}, got {step}")


def contrastive(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
) -> None:
    """The arguments that all contrastive losses share."""
    floating("image_features", image_features)
    if image_features.dim() != 2 or image_features.shape[0] == 0 or image_features.shape[1] == 0:
        raise ValueError(f"image_features: expected [N, D], N and D >= 1, got {tuple(image_features.shape)}")
    floating("text_features", text_features)
    shape("text_features", text_features, "N, D", image_features.shape)
    same_device("text_features", text_features, "image_features", image_features)
    for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if isinstance(value, Tensor):
            floating(name, value)
            if value.numel() != 1:
                raise ValueError(f"{name}: expected a scalar, got {tuple(value.shape)}")
            if value.dim() > 0 or value.device.type != "cpu":  # a scalar on the CPU fits any device
                same_device(name, value, "image_features", image_features)
        elif value is not None:
            finite_number(name, value)
        elif name == "logit_scale":
            raise TypeError("logit_scale: expected a number or a scalar tensor, got None")
