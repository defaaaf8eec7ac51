"""group_norm_silu and its gradient on the CPU, in dalle2_fast._C (csrc/cpu/group_norm_silu.cpp).

The forward pass reads x from memory and again from the L2 cache, and writes y. The backward pass does the
same with x and dy; it computes the activation's gradient in both passes, which costs less than to store it.

The tangent of the norm is the gradient of the norm (tangent.py has the formula), and so one call of the
backward pass; torch applies the affine map and the activation's derivative, in passes over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast import _C

from .._op import implement_on_cpu
from .._planes import memory_format
from . import _plan as plan
from .op import (
    empty_gradients,
    empty_outputs,
    group_norm_silu,
    group_norm_silu_backward,
    group_norm_silu_tangent,
)

_DTYPES = {getattr(torch, name): code for name, code in _C.DTYPES.items()}


def _images(source: plan.View, num_groups: int) -> tuple:
    """The arguments that _C calls images."""
    x = source.tensor
    return x.shape[0], x.shape[1], source.positions, num_groups, source.channels_adjacent, _DTYPES[x.dtype]


def _parameter(value: Tensor | None) -> tuple[int, int, int] | None:
    """A parameter [C] or [N, C] as _C takes it. `value` must stay alive during the call."""
    if value is None:
        return None
    return value.data_ptr(), _DTYPES[value.dtype], value.stride(0) if value.dim() == 2 else 0


def _forward(
    x: Tensor,  # [N, C, *]
    num_groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    scale: Tensor | None,  # [N, C]
    shift: Tensor | None,  # [N, C]
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, C, *] in the memory format of x; mean and rstd [N, G] in float32."""
    _check_dtype(x)
    y, mean, rstd = empty_outputs(x, num_groups)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    source = plan.view(x)
    given = [plan.rows(value) for value in (weight, bias, scale, shift)]
    _C.cpu.group_norm_silu(
        _images(source, num_groups), source.tensor.data_ptr(), source.sample_stride,
        y.data_ptr(), y.stride(0), tuple(_parameter(value) for value in given), silu,
        eps, mean.data_ptr(), rstd.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, rstd


def _backward(
    dy: Tensor,  # [N, C, *]
    x: Tensor,  # [N, C, *]
    mean: Tensor,  # [N, G]
    rstd: Tensor,  # [N, G]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    scale: Tensor | None,  # [N, C]
    shift: Tensor | None,  # [N, C]
    silu: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx in the memory format of x, and the gradients of weight, bias, scale and shift.

    A gradient has no elements if its tensor is None or `parameters` is False.
    """
    _check_dtype(x)
    gradients = empty_gradients(x, weight, bias, scale, shift, parameters)
    if x.numel() == 0:
        for gradient in gradients[1:]:
            gradient.zero_()
        return gradients
    source, dx = plan.view(x), gradients[0]
    dy = dy.to(x.dtype)
    if dy[:1].stride() != dx[:1].stride():
        dy = dy.contiguous(memory_format=memory_format(x))
    given = [plan.rows(value) for value in (weight, bias, scale, shift)]
    sums = mean.new_empty((2, *x.shape[:2]))
    _C.cpu.group_norm_silu_backward(
        _images(source, mean.shape[1]), dy.data_ptr(), dy.stride(0), source.tensor.data_ptr(),
        source.sample_stride, mean.data_ptr(), rstd.data_ptr(), tuple(_parameter(value) for value in given),
        silu, dx.data_ptr(), dx.stride(0), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if parameters:
        _parameter_gradients(sums.double(), gradients[1:], weight, bias, scale)
    return gradients


def _parameter_gradients(
    sums: Tensor,  # float64 [2, N, C]: of dz and of dz xhat over the positions
    gradients: tuple[Tensor, ...],  # of weight, bias, scale and shift; without elements if not wanted
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Write them. dshift = S1, dscale = weight S2 + bias S1, dweight = sum_n (1 + scale) S2, dbias the same
    of S1."""
    dweight, dbias, dscale, dshift = gradients
    if dshift.numel():
        dshift.copy_(sums[0])
    if dscale.numel():
        product = sums[1] if weight is None else weight * sums[1]
        dscale.copy_(product if bias is None else product + bias * sums[0])
    if scale is not None:
        sums = (1 + scale.double()) * sums
    if dweight.numel():
        dweight.copy_(sums[1].sum(0))
    if dbias.numel():
        dbias.copy_(sums[0].sum(0))


def _tangent(
    dx: Tensor,  # [N, C, *]
    x: Tensor,  # [N, C, *]
    mean: Tensor,  # [N, G]
    rstd: Tensor,  # [N, G]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    scale: Tensor | None,  # [N, C]
    shift: Tensor | None,  # [N, C]
    dgain: Tensor | None,  # [N, C]
    doffset: Tensor | None,  # [N, C]
    silu: bool,
) -> Tensor:
    """The tangent of y along dx, dgain and doffset, in the memory format of x."""
    _check_dtype(x)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=memory_format(x))
    samples, channels = x.shape[:2]
    width = channels // mean.shape[1]
    ones = (1,) * (x.dim() - 2)

    def per_channel(value: Tensor) -> Tensor:  # [C], [N, C] or [N, G] in float32, to broadcast over x
        if value.shape[-1] != channels:
            value = value.repeat_interleave(width, dim=1)
        return value.float().expand(samples, channels).reshape(samples, channels, *ones)

    given = x.float(), dx.float()  # of 16 bits, too, so that the result is rounded once
    norm = _backward(given[1], given[0], mean, rstd, None, None, None, None, False, False)[0]
    gain = torch.ones_like(mean) if weight is None else weight
    gain = per_channel(gain) if scale is None else per_channel(gain) * (1 + per_channel(scale))
    dz = norm if weight is None and scale is None else norm.mul_(gain)
    if silu or dgain is not None:
        normalised = (given[0] - per_channel(mean)).mul_(per_channel(rstd))
    if dgain is not None:
        dz = torch.addcmul(dz, normalised, per_channel(dgain), out=dz)
    if doffset is not None:
        dz = dz.add_(per_channel(doffset))
    if silu:
        offset = torch.zeros_like(gain) if bias is None else per_channel(bias)
        if bias is not None and scale is not None:
            offset = offset * (1 + per_channel(scale))
        if shift is not None:
            offset = offset + per_channel(shift)
        z = torch.addcmul(offset, normalised, gain, out=normalised)
        dz = torch.ops.aten.silu_backward(dz, z)
    return dz.to(x.dtype)


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")


implement_on_cpu(group_norm_silu, _forward)
implement_on_cpu(group_norm_silu_backward, _backward)
implement_on_cpu(group_norm_silu_tangent, _tangent)
