"""The contrastive and the sigmoid loss over the processes of torch.distributed, as autograd functions.

Each of W processes has n = N / W pairs of width D. For the contrastive loss it gathers the texts once and
computes its own rows [n, N] only: row_lse is then complete, and column_lse is the log-sum-exp over processes
of what each has for a column. The backward pass computes the gradient of the local images where they are, and
a reduce-scatter returns that of the texts. This gathers one tensor where open_clip gathers two, and computes
half of its products.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle2_fast.losses import local_terms
from dalle2_fast.losses.collectives import all_reduce, all_reduce_lse, gather, reduce_scatter
from dalle2_fast.losses.text_exchange import EVERYONE, return_gradients, text_blocks


class ContrastiveLoss(torch.autograd.Function):
    """local_loss and gather_with_grad are those of `ClipLoss`."""

    @staticmethod
    def forward(ctx, image, text, scale, local_loss, gather_with_grad, impl):
        n, rank = len(image), dist.get_rank()
        texts = gather(text)
        row_lse, column_lse, positive = local_terms.contrastive_lse(image, texts, scale, rank * n, impl)
        column_lse = all_reduce_lse(column_lse)
        ctx.save_for_backward(image, texts, scale, row_lse, column_lse)
        ctx.local_loss, ctx.gather_with_grad, ctx.impl = local_loss, gather_with_grad, impl

        local = slice(rank * n, rank * n + n)
        loss = ((row_lse - positive) + (column_lse[local] - positive)).sum() / (2 * n)
        return (loss if local_loss else all_reduce(loss) / dist.get_world_size()).to(scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        image, texts, scale, row_lse, column_lse = ctx.saved_tensors
        n, rank, world = len(image), dist.get_rank(), dist.get_world_size()
        needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]

        # The ops round once, at the largest gradient that reaches a loss; the remaining factor is usually 1.
        grads = gather(grad[None])
        largest = grads.abs().max()
        grads = torch.where(largest == 0, 0, grads / largest)
        lse = image, texts, scale, row_lse, column_lse
        if ctx.local_loss:
            unit = largest / (2 * n)
            d_image, d_text, d_scale = _gradient_of_sum(*lse, grads, unit, ctx.gather_with_grad, ctx.impl)
            d_text = reduce_scatter(d_text) if needs_text else None
            d_scale = all_reduce(d_scale) / world if needs_scale else None
        else:
            unit = largest / (2 * n * world)
            d_image, d_text, d_scale = local_terms.contrastive_gradient(
                *lse, rank * n, 1.0, 1.0, unit, ctx.impl
            )
            factor = grads.sum() if ctx.gather_with_grad else grads[rank]
            d_image = d_image.to(factor.dtype) * factor
            d_text = reduce_scatter(d_text) * factor if needs_text else None
            d_scale = all_reduce(d_scale) * grads[rank] if needs_scale else None
        d_image = d_image.to(image.dtype) if needs_image else None
        d_text = d_text.to(texts.dtype) if needs_text else None
        return d_image, d_text, d_scale, None, None, None


def _gradient_of_sum(
    image: Tensor,  # [n, D]
    texts: Tensor,  # [N, D]
    scale: Tensor,
    row_lse: Tensor,  # [n]
    column_lse: Tensor,  # [N]
    grads: Tensor,  # [W]
    unit: Tensor,
    gather_with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_image, d_texts and d_scale of unit * (sum over processes of grads times their local losses).

    It is what the rows of this process contribute. A row has the grad of this process as its weight, a column
    that of its text's process. The weight of a column goes into its lse, w exp(L - lse) = exp(L - (lse - log
    w)), so one call of the op computes the columns whose weights have one sign; the others get the lse +inf.
    Only the columns of this process have positives in these rows, so for the other sign `first` is N.
    Without gather_with_grad, d_image is that of the rows only and d_texts that of the columns only.
    """
    n, rank = len(image), dist.get_rank()

    def with_weights(weights: Tensor) -> Tensor:
        return column_lse - weights.clamp_min(0).log().repeat_interleave(n).to(column_lse.dtype)

    signs = grads.sign().tolist()  # on a GPU it waits for the forward pass, at the start of the backward pass
    calls = []  # factor, the column of row 0's positive, lse of the columns, weights of the rows and columns
    if signs[rank] != 0:
        ratio = with_weights(torch.where(grads == grads[rank], 1, grads / grads[rank]))
        for weights in ((1.0, 1.0),) if gather_with_grad else ((1.0, 0.0), (0.0, 1.0)):
            calls.append((grads[rank], rank * n, ratio, weights))
    for sign in (1.0, -1.0):
        if sign in signs and sign != signs[rank]:
            calls.append((sign, len(texts), with_weights(sign * grads), (0.0, 1.0)))

    d_image = image.new_zeros(image.shape, dtype=scale.dtype)
    d_texts, d_scale = texts.new_zeros(texts.shape, dtype=scale.dtype), torch.zeros_like(scale)
    for factor, first, lse, (row_weight, column_weight) in calls:
        parts = local_terms.contrastive_gradient(
            image, texts, scale, row_lse, lse, first, row_weight, column_weight, unit, impl
        )
        if gather_with_grad or row_weight:
            d_image += parts[0].to(scale.dtype) * factor
        if gather_with_grad or column_weight:
            d_texts += parts[1] * factor
        d_scale += parts[2] * factor
    return d_image, d_texts, d_scale


class SigmoidLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, if `tracked`, one block of texts at a time."""

    @staticmethod
    def forward(ctx, image, text, scale, bias, exchange, tracked, impl):
        n, rank = len(image), dist.get_rank()
        sums, d_texts = None, {}
        for owner, block in text_blocks(text, exchange):
            first, negatives_only = (rank * n, False) if owner == EVERYONE else (0, owner != rank)
            loss, d_image, d_texts[owner], d_scale, d_bias = local_terms.sigmoid_loss(
                image, block, scale, bias, first, negatives_only, tracked, impl
            )
            parts = loss, d_image, d_scale, d_bias
            sums = parts if sums is None else tuple(map(torch.add, sums, parts))
        loss, *gradients = sums
        ctx.exchange, ctx.dtype, ctx.owners = exchange, image.dtype, list(d_texts)
        if tracked:
            ctx.save_for_backward(*gradients, *d_texts.values())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        d_image, d_scale, d_bias, *d_texts = ctx.saved_tensors
        d_text = None
        if ctx.needs_input_grad[1]:
            blocks = {owner: block * grad for owner, block in zip(ctx.owners, d_texts, strict=True)}
            d_text = return_gradients(blocks, ctx.exchange).to(ctx.dtype)
        return (d_image * grad).to(ctx.dtype), d_text, d_scale * grad, d_bias * grad, None, None, None


class Gather(torch.autograd.Function):
    """[n, ...] -> [N, ...]. The gradient is that of the local rows; summed over processes if with_grad."""

    @staticmethod
    def forward(ctx, rows, with_grad):
        ctx.with_grad, ctx.length = with_grad, len(rows)
        return gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.with_grad:
            return reduce_scatter(grad), None
        return grad.narrow(0, dist.get_rank() * ctx.length, ctx.length), None
