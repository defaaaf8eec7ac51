"""y = act(gn(x) * (1 + scale) + shift): group norm, FiLM and SiLU as one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.ops import _checks, _dispatch
from dalle2_fast.ops._dtypes import compute_dtype, is_transformed, per_sample


def group_norm_silu(
    x: Tensor,  # [N, C, *]
    num_groups: int,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    activation: str | None = "silu",
    impl: str = "auto",
) -> Tensor:  # [N, C, *]
    """Group normalisation, an optional scale and shift per sample (FiLM), and SiLU in one op.

    y = act(gn(x) * (1 + scale) + shift), gn(x) = (x - mean) / sqrt(var + eps) * weight + bias. The mean and
    the biased variance are taken over each sample's group of C / num_groups channels and over all positions.

    Args:
        x: floating point [N, C, *]. Usually 2 to 5 dimensions, contiguous or channels_last.
        num_groups: a divisor of C.
        weight: factor of the normalised values [C], any floating dtype. None means 1.
        bias: offset of the normalised values [C], any floating dtype. None means 0.
        eps: number >= 0 that is added to the variance.
        scale: FiLM scale [N, C], any floating dtype. None means 0.
        shift: FiLM shift [N, C], any floating dtype. None means 0.
        activation: "silu" or None.
        impl: "auto", "reference" or "fused".

    Returns:
        [N, C, *] in the dtype and memory format of x (contiguous under torch.func). Statistics and maths are
        float32 (float64 for a float64 x) and are rounded once at the end; autocast does not change this. Its
        kernels also have one level of forward mode (torch.func.jvp, torch.autograd.forward_ad).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device.
        RuntimeError: impl="fused" and no kernel can run here.
        NotImplementedError: a gradient or a tangent that a kernel computed is differentiated again.

    Source: Wu and He, 1803.08494 (group norm); Dhariwal and Nichol, 2105.05233, equation 4 (scale and shift).

    Example:
        >>> from dalle2_fast import functional
        >>> x = torch.randn(2, 8, 4, 4)
        >>> scale, shift = torch.randn(2, 16).chunk(2, dim=1)
        >>> functional.group_norm_silu(x, num_groups=4, scale=scale, shift=shift).shape
        torch.Size([2, 8, 4, 4])
    """
    _check_arguments(x, num_groups, weight, bias, eps, scale, shift, activation)
    if _dispatch.use_reference(impl, x, forward_mode=True):
        return group_norm_silu_reference(x, num_groups, weight, bias, eps, scale, shift, activation)
    return _dispatch.kernel("group_norm_silu")(
        x, num_groups, weight, bias, float(eps), scale, shift, activation == "silu"
    )[0]


def _check_arguments(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> None:
    _checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected [N, C, ...] with at least 2 dimensions, got {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    if not isinstance(num_groups, int) or isinstance(num_groups, bool):
        raise TypeError(f"num_groups: expected an int, got {type(num_groups).__name__}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of C = {channels}, got {num_groups}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _checks.floating(name, value)
            _checks.shape(name, value, "C", (channels,))
            _checks.same_device(name, value, "x", x)
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            _checks.floating(name, value)
            _checks.shape(name, value, "N, C", (batch, channels))
            _checks.same_device(name, value, "x", x)
    _checks.finite_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    if activation not in ("silu", None):
        raise ValueError(f"activation: expected 'silu' or None, got {activation!r}")


def group_norm_silu_reference(
    x: Tensor,  # [N, C, *]
    num_groups: int,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    activation: str | None = "silu",
) -> Tensor:  # [N, C, *], dtype and memory format of x
    """y = act(gn(x) * (1 + scale) + shift)"""
    dtype = compute_dtype(x.dtype)
    layout = _memory_format(x)
    y = x.to(dtype)
    if is_transformed():
        y = y.contiguous()  # torch's forward-mode rule of group_norm cannot view other layouts
    if layout != torch.contiguous_format and x.numel() > 0:
        # In this layout torch's CPU variance is E[x^2] - E[x]^2: float32 results are 8 % off for mean 1e3 and
        # sigma 1. A constant that is subtracted from a whole group does not change the norm, so subtract the
        # group's first element.
        group_width = x.shape[1] // num_groups
        first = y.detach()[(slice(None), slice(None, None, group_width)) + (0,) * (x.dim() - 2)]  # [N, G]
        y = y - per_sample(first.repeat_interleave(group_width, dim=1), x)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's backward fails on a bias without a weight
    weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
    if x.numel() > 0:
        # Not F.group_norm, which refuses a single value per group where there is one sample. Such a value is
        # its mean, so the norm is 0, as it is with several samples.
        y = torch.group_norm(y, num_groups, weight, bias, eps)
    elif weight is not None:  # torch leaves the gradients of weight and bias uninitialised here
        y = torch.addcmul(_per_channel(bias, y) if bias is not None else y, y, _per_channel(weight, y))
    if scale is not None:
        gain = per_sample(1 + scale.to(dtype), x)
        # addcmul makes one pass over y; a product and a sum would make two.
        y = y * gain if shift is None else torch.addcmul(per_sample(shift.to(dtype), x), y, gain)
    elif shift is not None:
        y = y + per_sample(shift.to(dtype), x)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype).contiguous(memory_format=layout)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], which broadcasts over the positions of x."""
    return value.reshape(value.shape + (1,) * (x.dim() - 2))


def _memory_format(x: Tensor) -> torch.memory_format:
    if not is_transformed() and not x.is_contiguous():  # vmap cannot tell channels_last
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format
