"""Argument checks of the public ops: the same on every backend, raised before any work is done.

A wrong type or dtype is a TypeError, a wrong shape, value or device a ValueError. Each message names the
argument, what was expected (the letters and the numbers of a shape) and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_TABLE_COLUMNS = 8


def _name(value: object) -> str:
    return type(value).__name__


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_name(value)}")


def floating(name: str, value: Tensor) -> None:
    tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")


def shape(name: str, value: Tensor, letters: str, expected: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected [{letters}] = {tuple(expected)}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} (that of {other_name}), got {value.device}")


def finite_number(name: str, value: object) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {_name(value)}")
    if not -math.inf < value < math.inf:  # torch.compile cannot trace isfinite of a symbolic float
        raise ValueError(f"{name}: expected a finite number, got {value}")


def positive_number(name: str, value: object) -> None:
    finite_number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, activation) -> None:
    floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected [N, C, ...] with at least 2 dimensions, got {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    if not isinstance(num_groups, int) or isinstance(num_groups, bool):
        raise TypeError(f"num_groups: expected an int, got {_name(num_groups)}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of C = {channels}, got {num_groups}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            floating(name, value)
            shape(name, value, "C", (channels,))
            same_device(name, value, "x", x)
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            floating(name, value)
            shape(name, value, "N, C", (batch, channels))
            same_device(name, value, "x", x)
    finite_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    if activation not in ("silu", None):
        raise ValueError(f"activation: expected 'silu' or None, got {activation!r}")


def cross_attention(q, context_k, context_v, context_mask, image_k, image_v, softmax_scale) -> None:
    floating("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, H, T, D], got {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    if width == 0:
        raise ValueError(f"q: expected a head width D >= 1, got {tuple(q.shape)}")
    if (image_k is None) != (image_v is None):
        given, missing = ("image_k", "image_v") if image_v is None else ("image_v", "image_k")
        raise ValueError(f"{missing}: expected a tensor because {given} is given, got None")
    device = q.device.type  # meta knows no autocast
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    pairs = [("context", "S", context_k, context_v)]
    if image_k is not None:
        pairs.append(("image", "T2", image_k, image_v))
    for kind, letter, k, v in pairs:
        for name, value in ((f"{kind}_k", k), (f"{kind}_v", v)):
            floating(name, value)
            if value.dim() != 4:
                raise ValueError(f"{name}: expected [B, H, {letter}, D], got {tuple(value.shape)}")
            length = k.shape[2]
            shape(name, value, f"B, H, {letter}, D", (batch, heads, length, width))
            same_device(name, value, "q", q)
            # Under autocast the dtypes meet in attention itself.
            if value.dtype != q.dtype and not autocast:
                raise TypeError(f"{name}: expected {q.dtype} (that of q), got {value.dtype}")
    if context_mask is not None:
        tensor("context_mask", context_mask)
        if context_mask.dtype != torch.bool:
            raise TypeError(f"context_mask: expected torch.bool (True = attend), got {context_mask.dtype}")
        shape("context_mask", context_mask, "B, S", (batch, context_k.shape[2]))
        same_device("context_mask", context_mask, "q", q)
    if softmax_scale is not None:
        finite_number("softmax_scale", softmax_scale)


def seeds_and_step(seeds, step, batch: int) -> None:
    tensor("seeds", seeds)
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds: expected torch.int64, got {seeds.dtype}")
    shape("seeds", seeds, "B", (batch,))
    step_index(step, seeds)


def step_index(step, beside: Tensor, length: int | None = None) -> None:
    if isinstance(step, Tensor):
        if step.dtype != torch.int64:
            raise TypeError(f"step: expected torch.int64, got {step.dtype}")
        if step.numel() != 1:
            raise ValueError(f"step: expected a scalar, got {tuple(step.shape)}")
        if step.device != beside.device:
            raise ValueError(f"step: expected device {beside.device}, got {step.device}")
        return
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step: expected an int or an int64 scalar tensor, got {_name(step)}")
    if step < 0 or step >= (2**63 if length is None else length):
        expected = "0 <= step < 2**63" if length is None else f"0 <= step < {length} (the rows of table)"
        raise ValueError(f"step: expected {expected}, got {step}")


def sample_noise(seeds, step, shape_, dtype) -> None:
    shape_ = tuple(shape_)
    if not shape_ or not all(isinstance(size, int) and size >= 0 for size in shape_):
        raise ValueError(f"shape: expected (B, ...) of sizes >= 0, got {shape_}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype}")
    seeds_and_step(seeds, step, shape_[0])


def add_noise(x0, alpha, sigma, noise, seeds, step) -> None:
    floating("x0", x0)
    if x0.dim() < 1:
        raise ValueError(f"x0: expected [B, ...], got {tuple(x0.shape)}")
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        floating(name, value)
        shape(name, value, "B", x0.shape[:1])
        same_device(name, value, "x0", x0)
    if (noise is None) == (seeds is None):
        came = "neither" if noise is None else "both"
        raise ValueError(f"noise, seeds: expected exactly one of the two, got {came}")
    if noise is not None:
        floating("noise", noise)
        shape("noise", noise, "B, ...", x0.shape)
        same_device("noise", noise, "x0", x0)
    else:
        seeds_and_step(seeds, step, x0.shape[0])
        same_device("seeds", seeds, "x0", x0)


def diffusion_step(
    x, model_output, table, step, seeds, guidance, guidance_rescale, prediction, clip, dynamic_threshold,
    learned_range, previous_x0,
) -> None:  # fmt: skip
    floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected [B, C, ...] with at least 2 dimensions, got {tuple(x.shape)}")
    batch, channels = x.shape[:2]

    floating("model_output", model_output)
    rows = batch if guidance is None else 2 * batch
    letters = ("B" if guidance is None else "2B") + (", 2C" if learned_range else ", C")
    letters += ", ..." if x.dim() > 2 else ""
    shape("model_output", model_output, letters, (rows, channels * (2 if learned_range else 1), *x.shape[2:]))
    same_device("model_output", model_output, "x", x)

    floating("table", table)
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"table: expected torch.float32 or torch.float64, got {table.dtype}")
    if table.dim() != 2 or table.shape[1] != _TABLE_COLUMNS or table.shape[0] == 0:
        raise ValueError(f"table: expected [steps >= 1, {_TABLE_COLUMNS}], got {tuple(table.shape)}")
    same_device("table", table, "x", x)
    step_index(step, x, length=table.shape[0])

    if seeds is not None:
        seeds_and_step(seeds, step, batch)
        same_device("seeds", seeds, "x", x)
    if isinstance(guidance, Tensor):
        if guidance.dim() > 0:
            shape("guidance", guidance, "B", (batch,))
        same_device("guidance", guidance, "x", x)
    elif guidance is not None:
        finite_number("guidance", guidance)
    finite_number("guidance_rescale", guidance_rescale)
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale: expected a number in [0, 1], got {guidance_rescale}")
    if guidance_rescale > 0 and guidance is None:
        raise ValueError(f"guidance_rescale: expected 0 because guidance is None, got {guidance_rescale}")
    if prediction not in _PREDICTIONS:
        raise ValueError(f"prediction: expected one of {_PREDICTIONS}, got {prediction!r}")
    if clip is not None:
        positive_number("clip", clip)
    if dynamic_threshold is not None:
        positive_number("dynamic_threshold", dynamic_threshold)
        if dynamic_threshold > 1:
            raise ValueError(f"dynamic_threshold: expected a quantile in (0, 1], got {dynamic_threshold}")
    if previous_x0 is not None:
        floating("previous_x0", previous_x0)
        shape("previous_x0", previous_x0, "B, C, ..." if x.dim() > 2 else "B, C", x.shape)
        same_device("previous_x0", previous_x0, "x", x)


def contrastive(image_features, text_features, logit_scale, logit_bias=None) -> None:
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
            if value.dim() > 0 or value.device.type != "cpu":  # a scalar on the CPU goes with any device
                same_device(name, value, "image_features", image_features)
        elif value is not None:
            finite_number(name, value)
        elif name == "logit_scale":
            raise TypeError("logit_scale: expected a number or a scalar tensor, got None")
