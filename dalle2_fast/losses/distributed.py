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
        local_grad = grads[rank]
        unit = largest / (2 * n if ctx.local_loss else 2 * n * world)
        weighted_lse = column_lse
        if ctx.local_loss:
            # The term of a column is weighted with the grad of its text's process. exp(L - lse) is to be
            # multiplied by (that grad / local_grad), which goes into the lse.
            ratio = torch.where(grads == local_grad, 1, grads / local_grad)
            weighted_lse = column_lse - ratio.log().repeat_interleave(n).to(column_lse.dtype)

        def gradient(row_weight: float, column_weight: float) -> tuple[Tensor, Tensor, Tensor]:
            return local_terms.contrastive_gradient(
                image,
                texts,
                scale,
                row_lse,
                weighted_lse,
                rank * n,
                row_weight,
                column_weight,
                unit,
                ctx.impl,
            )

        if ctx.local_loss and not ctx.gather_with_grad:
            d_image, _, scale_of_rows = gradient(1.0, 0.0)
            _, d_text, scale_of_columns = gradient(0.0, 1.0)
            d_scale = scale_of_rows + scale_of_columns
        else:
            d_image, d_text, d_scale = gradient(1.0, 1.0)

        if ctx.local_loss:
            d_text = reduce_scatter(d_text * local_grad) if needs_text else None
            d_scale = all_reduce(d_scale * local_grad) / world if needs_scale else None
            factor = local_grad
        else:
            factor = grads.sum() if ctx.gather_with_grad else local_grad
            d_text = reduce_scatter(d_text) * factor if needs_text else None
            d_scale = all_reduce(d_scale) * local_grad if needs_scale else None
        d_image = (d_image.to(factor.dtype) * factor).to(image.dtype) if needs_image else None
        d_text = d_text.to(texts.dtype) if needs_text else None
        return d_image, d_text, d_scale, None, None, None


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
