"""The op group_norm_silu, its gradient and its tangent: schemas, shapes of the outputs, what autograd saves.

forward.py, backward.py and tangent.py implement them in Triton, native.py implements them on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import define, differentiate
from .._planes import memory_format


def empty_outputs(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised y [N, C, *] in the memory format of x; mean and rstd [N, G] in float32."""
    y = torch.empty_like(x, memory_format=memory_format(x))
    mean = torch.empty((x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    return y, mean, torch.empty_like(mean)


def empty_gradients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dx in the memory format of x, and the gradients of weight, bias, scale and shift.

    A gradient has no elements if its tensor is None or `parameters` is False.
    """
    dweight, dbias, dscale, dshift = (
        x.new_empty(0)
        if value is None or not parameters
        else torch.empty_like(value, memory_format=torch.contiguous_format)
        for value in (weight, bias, scale, shift)
    )
    return torch.empty_like(x, memory_format=memory_format(x)), dweight, dbias, dscale, dshift


group_norm_silu = define(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
    "Tensor? shift, bool silu) -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=lambda x, num_groups, *_: empty_outputs(x, num_groups),
)
group_norm_silu_backward = define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, bool silu, bool parameters) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale, Tensor dshift)",
    fake=lambda dy, x, mean, rstd, weight, bias, scale, shift, silu, parameters: empty_gradients(
        x, weight, bias, scale, shift, parameters
    ),
)
group_norm_silu_tangent = define(
    "group_norm_silu_tangent(Tensor dx, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, Tensor? dgain, Tensor? doffset, bool silu) -> Tensor dy",
    fake=lambda dx, x, *_: torch.empty_like(x, memory_format=memory_format(x)),
)


def _save(ctx, inputs, output) -> None:
    x, _, weight, bias, _, scale, shift, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
    ctx.save_for_forward(x, mean, rstd, weight, bias, scale, shift)


def _backward(ctx, dy, _dmean, _drstd):
    if dy is None:  # a later function has no gradient for y
        return (None,) * 8
    _, _, weight, bias, _, scale, shift, _ = ctx.needs_input_grad
    gradients = group_norm_silu_backward(
        dy, *ctx.saved_tensors, ctx.silu, weight or bias or scale or shift
    )  # gradients that are not asked for have no elements
    dx, dweight, dbias, dscale, dshift = gradients
    return (
        dx, None, dweight if weight else None, dbias if bias else None, None,
        dscale if scale else None, dshift if shift else None, None,
    )  # fmt: skip


def _tangent(ctx, dx, _groups, dweight, dbias, _eps, dscale, dshift, _silu):
    x, _, _, weight, bias, scale, _ = ctx.saved_tensors
    if dx is None:
        dx = x.new_zeros(()).expand_as(x)
    dgain = _scaled_tangent(weight, scale, dweight, dscale, x)
    doffset = _scaled_tangent(bias, scale, dbias, dscale if bias is not None else None, x)
    if dshift is not None:
        doffset = dshift.float() if doffset is None else doffset + dshift
    return group_norm_silu_tangent(dx, *ctx.saved_tensors, dgain, doffset, ctx.silu), None, None


def _scaled_tangent(
    value: Tensor | None,  # [C], of which None is 1
    scale: Tensor | None,  # [N, C]
    dvalue: Tensor | None,  # [C]
    dscale: Tensor | None,  # [N, C]
    x: Tensor,  # [N, C, *]
) -> Tensor | None:
    """The tangent of value (1 + scale), float32 [N, C]; None if it is 0."""
    tangent = None
    if dscale is not None:
        tangent = dscale.float() if value is None else dscale * value.float()
    if dvalue is not None:
        scaled = dvalue.float().expand(x.shape[:2]) if scale is None else dvalue * (1 + scale.float())
        tangent = scaled if tangent is None else tangent + scaled
    return tangent


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError('group_norm_silu: the kernel has no second derivative; use impl="reference"')


differentiate(group_norm_silu, save=_save, backward=_backward, tangent=_tangent)
for _derivative in (group_norm_silu_backward, group_norm_silu_tangent):
    differentiate(_derivative, save=lambda ctx, inputs, output: None, backward=_no_second_derivative)
