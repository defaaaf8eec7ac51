"""The op group_norm_silu and its gradient: schemas, shapes of the outputs, what autograd saves.

forward.py and backward.py implement them in Triton, native.py implements them on the CPU.
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


def _save(ctx, inputs, output) -> None:
    x, _, weight, bias, _, scale, shift, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)


def _backward(ctx, dy, _dmean, _drstd):
    _, _, weight, bias, _, scale, shift, _ = ctx.needs_input_grad
    gradients = group_norm_silu_backward(
        dy, *ctx.saved_tensors, ctx.silu, weight or bias or scale or shift
    )  # gradients that are not asked for have no elements
    dx, dweight, dbias, dscale, dshift = gradients
    return (
        dx, None, dweight if weight else None, dbias if bias else None, None,
        dscale if scale else None, dshift if shift else None, None,
    )  # fmt: skip


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError('group_norm_silu: the kernel has no second derivative; use impl="reference"')


differentiate(group_norm_silu, save=_save, backward=_backward)
differentiate(group_norm_silu_backward, save=lambda ctx, inputs, output: None, backward=_no_second_derivative)
