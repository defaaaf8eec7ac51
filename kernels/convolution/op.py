"""The op conv3x3: schema, shape of the output, gradients.

native.py implements it on the CPU. There is no kernel for GPUs, where cuDNN's are hard to beat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import define, differentiate


def empty_output(x: Tensor, weight: Tensor, upsample: bool) -> Tensor:
    """Uninitialised y [N, C_out, H, W] in channels_last."""
    factor = 2 if upsample else 1
    shape = (x.shape[0], weight.shape[0], factor * x.shape[2], factor * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


conv3x3 = define(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool upsample) -> Tensor",
    fake=lambda x, weight, bias, residual, upsample: empty_output(x, weight, upsample),
)


def _save(ctx, inputs, output) -> None:
    x, weight, _, _, ctx.upsample = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
    dx = dweight = dbias = None
    if needs_x:
        # The gradient of this convolution is a convolution with the filters turned by half a turn.
        turned = weight.transpose(0, 1).flip(2, 3)
        dx = conv3x3(dy, turned, None, None, False)
        if ctx.upsample:
            dx = 4 * torch.nn.functional.avg_pool2d(dx, 2)
    if needs_weight:
        if ctx.upsample:
            x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        one = [1, 1]
        _, dweight, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, one, one, one, False, [0, 0], 1, [False, True, False]
        )
    if needs_bias:
        dbias = dy.sum((0, 2, 3))
    return dx, dweight, dbias, dy if needs_residual else None, None


differentiate(conv3x3, save=_save, backward=_backward)
