"""The contrastive and the sigmoid loss over the processes of torch.distributed, as autograd functions.

With W processes each holds n = N / W pairs. It gathers the texts once and works on its own rows [n, N]
alone: row_lse is complete at once, column_lse is the log-sum-exp over processes of what each has for a
column. The backward pass makes the gradient of the own images where they are, and a reduce-scatter brings
home that of the texts: one gathered tensor where open_clip has two, and half of its products.

Sizes: n own pairs, N = W n pairs of all, D the width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle2_fast.ops import _dispatch

_EVERYONE = -1  # the owner of a block with the texts of all processes


def gather(rows: Tensor) -> Tensor:  # [n, ...] -> [N, ...]
    everything = rows.new_empty((dist.get_world_size() * rows.shape[0], *rows.shape[1:]))
    # The older name warns since torch 2.13, which has the newer.
    collect = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collect(everything, rows.contiguous())
    return everything


def _scatter_sum(rows: Tensor) -> Tensor:  # [N, ...] -> [n, ...], the sum over processes of one's own rows
    mine = rows.new_empty((rows.shape[0] // dist.get_world_size(), *rows.shape[1:]))
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce(mine, rows.contiguous())
    return mine


def _sum(value: Tensor) -> Tensor:
    total = value.clone()
    dist.all_reduce(total)
    return total


def _join_lse(lse: Tensor) -> Tensor:  # [N] -> [N], the log-sum-exp over processes
    largest = lse.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest + _sum((lse - largest).exp()).log()  # infinite or NaN here: NaN


class ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, local, with_grad, impl):
        n, rank = len(image), dist.get_rank()
        texts = gather(text)
        row_lse, column_lse, own = _contrastive_lse(image, texts, scale, rank * n, impl)
        column_lse = _join_lse(column_lse)
        ctx.save_for_backward(image, texts, scale, row_lse, column_lse)
        ctx.local, ctx.with_grad, ctx.impl = local, with_grad, impl

        mine = slice(rank * n, rank * n + n)
        loss = ((row_lse - own) + (column_lse[mine] - own)).sum() / (2 * n)
        return (loss if local else _sum(loss) / dist.get_world_size()).to(scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        image, texts, scale, row_lse, column_lse = ctx.saved_tensors
        n, rank, world = len(image), dist.get_rank(), dist.get_world_size()
        needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]

        # The ops round once, at the largest gradient that reaches a loss; what is left is usually a factor 1.
        grads = gather(grad[None])
        largest = grads.abs().max()
        grads = torch.where(largest == 0, 0, grads / largest)
        mine = grads[rank]
        unit = largest / (2 * n if ctx.local else 2 * n * world)
        weighted_lse = column_lse
        if ctx.local:
            # A column's term has the g of its text's process: exp(L - lse) g' / g, and the lse takes g' / g.
            ratio = torch.where(grads == mine, 1, grads / mine)
            weighted_lse = column_lse - ratio.log().repeat_interleave(n).to(column_lse.dtype)

        def gradient(*weights):
            return _contrastive_gradient(
                image, texts, scale, row_lse, weighted_lse, rank * n, *weights, unit, ctx.impl
            )

        if ctx.local and not ctx.with_grad:
            d_image, _, scale_of_rows = gradient(1.0, 0.0)
            _, d_text, scale_of_columns = gradient(0.0, 1.0)
            d_scale = scale_of_rows + scale_of_columns
        else:
            d_image, d_text, d_scale = gradient(1.0, 1.0)

        if ctx.local:
            d_text = _scatter_sum(d_text * mine) if needs_text else None
            d_scale = _sum(d_scale * mine) / world if needs_scale else None
            factor = mine
        else:
            factor = grads.sum() if ctx.with_grad else mine
            d_text = _scatter_sum(d_text) * factor if needs_text else None
            d_scale = _sum(d_scale) * mine if needs_scale else None
        d_image = (d_image.to(factor.dtype) * factor).to(image.dtype) if needs_image else None
        d_text = d_text.to(texts.dtype) if needs_text else None
        return d_image, d_text, d_scale, None, None, None


class SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, bias, exchange, tracked, impl):
        n, rank = len(image), dist.get_rank()
        sums, d_texts = None, {}
        for owner, block in _text_blocks(text, exchange):
            first, negatives_only = (rank * n, False) if owner == _EVERYONE else (0, owner != rank)
            loss, d_image, d_texts[owner], d_scale, d_bias = _sigmoid_loss(
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
            d_text = _bring_home(blocks, ctx.exchange).to(ctx.dtype)
        return (d_image * grad).to(ctx.dtype), d_text, d_scale * grad, d_bias * grad, None, None, None


class Gather(torch.autograd.Function):
    """[n, ...] -> [N, ...]. The gradient: that of the own rows; summed over processes where with_grad."""

    @staticmethod
    def forward(ctx, rows, with_grad):
        ctx.with_grad, ctx.length = with_grad, len(rows)
        return gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.with_grad:
            return _scatter_sum(grad), None
        return grad.narrow(0, dist.get_rank() * ctx.length, ctx.length), None


# -------------------------------------------------------------------------------------- exchange of the texts


def _text_blocks(text: Tensor, exchange: str) -> Iterator[tuple[int, Tensor]]:
    """(owner, its texts) for every process, each once; with "gather" one block of all, owner _EVERYONE."""
    rank, world = dist.get_rank(), dist.get_world_size()
    text = text.contiguous()
    if exchange == "gather":
        yield _EVERYONE, gather(text)
    elif exchange == "reduce":
        for owner in range(world):
            block = text if owner == rank else torch.empty_like(text)
            dist.broadcast(block, src=owner)
            yield owner, block
    else:
        rightward, leftward = _hops(exchange)
        from_right = _ring(text, -1, leftward)
        next(from_right)  # the own block, which the other way round yields too
        for blocks in itertools.zip_longest(_ring(text, 1, rightward), from_right):
            yield from filter(None, blocks)


def _bring_home(blocks: dict[int, Tensor], exchange: str) -> Tensor:
    """{owner: gradient of its texts made here} -> the own texts' gradient, summed over processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if exchange == "gather":
        return _scatter_sum(blocks[_EVERYONE])
    if exchange == "reduce":
        for owner, block in sorted(blocks.items()):
            dist.reduce(block, dst=owner)
        return blocks[rank]
    total = blocks[rank]
    for step, hops in zip((1, -1), _hops(exchange), strict=True):
        # The block of the farthest owner goes first, and collects the others' share on its way home.
        sent = None
        for hop in range(hops, 0, -1):
            block = blocks[(rank - step * hop) % world]
            sent = _pass_on(block if sent is None else sent + block, -step)()
        total = total if sent is None else total + sent
    return total


def _hops(exchange: str) -> tuple[int, int]:
    """How far a block travels rightward (to higher ranks) and leftward."""
    others = dist.get_world_size() - 1
    return (others, 0) if exchange == "shift" else (others - others // 2, others // 2)


def _ring(text: Tensor, step: int, hops: int) -> Iterator[tuple[int, Tensor]]:
    """The own block and those of the `hops` processes behind; the next travels while one is worked on."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for hop in range(hops + 1):
        arrival = _pass_on(text, step) if hop < hops else None
        yield (rank - step * hop) % world, text
        text = text if arrival is None else arrival()


def _pass_on(block: Tensor, step: int) -> Callable[[], Tensor]:
    """Sends to the neighbour `step` away, receives from the one behind; call the result to wait for it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(block)
    requests = dist.batch_isend_irecv([
        dist.P2POp(dist.isend, block, (rank + step) % world),
        dist.P2POp(dist.irecv, received, (rank - step) % world),
    ])  # fmt: skip

    def arrival() -> Tensor:
        for request in requests:
            request.wait()
        return received

    return arrival


# ----------------------------------------------------------------------------------------- one process's tile


def _contrastive_lse(image, texts, scale, first, impl) -> tuple[Tensor, Tensor, Tensor]:
    """row_lse [n], column_lse [N] of these rows alone, and the logits L[i, first + i] [n]."""
    if _dispatch.use_native(impl, image, texts):
        return torch.ops.dalle2_fast.contrastive_lse(image, texts, scale, first)
    with torch.autocast(image.device.type, enabled=False):
        logits = scale * (image.to(scale.dtype) @ texts.to(scale.dtype).T)
        return logits.logsumexp(1), logits.logsumexp(0), logits.diagonal(first)[: len(image)]


def _contrastive_gradient(
    image, texts, scale, row_lse, column_lse, first, row_weight, column_weight, grad, impl
) -> tuple[Tensor, Tensor, Tensor]:
    """d_image in its dtype, d_texts and d_scale of grad times: row_weight sum (row_lse[i] - L[i, first + i])
    over these rows, and their part in column_weight sum (column_lse[j] - L[image of j, j]) over all texts."""
    if _dispatch.use_native(impl, image, texts):
        return torch.ops.dalle2_fast.contrastive_gradient(
            image, texts, scale, row_lse, column_lse, first, row_weight, column_weight, grad
        )
    with torch.autocast(image.device.type, enabled=False):
        wide_image, texts = image.to(scale.dtype), texts.to(scale.dtype)
        products = wide_image @ texts.T
        logits = scale * products
        d_logits = row_weight * (logits - row_lse[:, None]).exp()
        d_logits += column_weight * (logits - column_lse).exp()
        d_logits.diagonal(first)[: len(image)].sub_(row_weight + column_weight)
        d_logits *= grad
        d_image, d_texts = scale * d_logits @ texts, scale * d_logits.T @ wide_image
        return d_image.to(image.dtype), d_texts, (d_logits * products).sum()


def _sigmoid_loss(
    image, texts, scale, bias, first, negatives_only, gradients, impl
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of these rows, divided by n, and d_image, d_texts, d_scale, d_bias."""
    if _dispatch.use_native(impl, image, texts):
        return torch.ops.dalle2_fast.sigmoid_loss(
            image, texts, scale, bias, first, negatives_only, gradients
        )
    with torch.autocast(image.device.type, enabled=False):
        image, texts = image.to(scale.dtype), texts.to(scale.dtype)
        products = image @ texts.T
        signs = torch.full_like(products, -1)
        if not negatives_only:
            signs.diagonal(first)[: len(image)].fill_(1)
        signed = signs * (scale * products + bias)
        d_logits = -signs * torch.sigmoid(-signed) / len(image)
        loss = -F.logsigmoid(signed).sum() / len(image)
        d_image, d_texts = scale * d_logits @ texts, scale * d_logits.T @ image
        return loss, d_image, d_texts, (d_logits * products).sum(), d_logits.sum()
