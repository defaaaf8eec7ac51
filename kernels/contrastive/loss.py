"""loss = mean_i (log sum_j exp L[i, j] + log sum_j exp L[j, i]) / 2 - L[i, i],  L = scale I T^T

The contrastive losses (InfoNCE, SigLIP's sigmoid loss, InfoNCE with soft targets) in memory O(N D) and a
workspace of bounded size: the N^2 logits exist a tile at a time. Both directions of the softmax come from one
matrix product, and one exponential per element serves both. The gradient makes the tiles again: 8 N^2 D
operations in all, against 12 where each direction has logits of its own.

Rows may be a process's own part of the batch: n local rows against all m texts, `first` the index of the text
of row 0. The maths is float32 (float64 for float64 features), also under autocast, and equal calls give equal
bits. The tiles and what a device does with them are in _tiles.py, the maths in csrc/.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import define, differentiate
from ._tiles import Cut, OnCpu, OnCuda, Tiles, put_product, wide


def _exactly(run: Callable) -> Callable:
    """Autocast would round the matrix products, and autograd would keep the tiles."""

    @functools.wraps(run)
    def wrapped(image: Tensor, *arguments, **options):
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return run(image, *arguments, **options)

    return wrapped


def _tiles(image: Tensor, text: Tensor, scale: Tensor) -> Tiles:
    return (OnCuda if image.is_cuda else OnCpu)(image, text, scale)


class _Gradients:
    """dI = scale factor G T and dT = scale factor G^T I, a tile of G at a time."""

    def __init__(self, tiles: Tiles):
        self.tiles = tiles
        self.image = torch.empty(tiles.image.shape, dtype=tiles.dtype, device=tiles.image.device)
        self.text = torch.empty(tiles.text.shape, dtype=tiles.dtype, device=tiles.image.device)

    def add(self, cut: Cut, gradient: Tensor) -> None:
        tiles, (rows, columns, _) = self.tiles, cut
        put_product(self.image[rows], gradient, tiles.text[columns], add=columns.start > 0)
        put_product(self.text[columns], gradient.T, tiles.image[rows], add=rows.start > 0)

    def times(self, factor: Tensor | float) -> tuple[Tensor, Tensor]:
        """Small factors come last: 1 / 2N on G would take it out of the range of half precision."""
        factor = factor * self.tiles.scale / self.tiles.gain
        return self.image.mul_(factor), self.text.mul_(factor)


# ----------------------------------------------------------------------------------------- log of sums of exp


def _running(size: int, like: Tiles) -> Tensor:
    return like.sums.new_full((size,), -math.inf)


def _lse_of(tiles: Tiles, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """row_lse [n], column_lse [m], L[i, first + i] [n], NaN for a row whose text is not there; float64."""
    n, m = tiles.image.shape[0], tiles.text.shape[0]
    at_once = tiles.lse_at_once(first)
    if at_once is not None:
        row_lse, column_lse, own = at_once
    else:
        row_lse, column_lse = _running(n, tiles), _running(m, tiles)
        own = torch.full((n,), math.nan, dtype=tiles.dtype, device=row_lse.device)
        # The tiles that the gradient will have: another shape may get another of cuBLAS's kernels, which may
        # round products in another way, and then L - lse of an easy pair, which is small, is not what it was.
        for cut in tiles.over("clip", first, gradients=True):
            tile = tiles.products(cut)
            tiles.lse(tile, cut.own, 1.0, row_lse[cut.rows], column_lse[cut.columns])
            if -tile.shape[0] < cut.own < tile.shape[1]:
                pairs = tile.diagonal(cut.own)
                begin = cut.rows.start + max(0, -cut.own)
                own[begin : begin + pairs.shape[0]] = pairs
    return row_lse, column_lse, (own * tiles.scale).double()


@_exactly
def _lse(image: Tensor, text: Tensor, scale: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return _lse_of(_tiles(image, text, scale), first)


def _fake_lse(image, text, scale, first=0):
    rows = image.new_empty(image.shape[0], dtype=torch.float64)
    return rows, text.new_empty(text.shape[0], dtype=torch.float64), torch.empty_like(rows)


contrastive_lse = define(
    "contrastive_lse(Tensor image, Tensor text, Tensor scale, int first=0) -> (Tensor, Tensor, Tensor)",
    run=_lse,
    fake=_fake_lse,
)


@_exactly
def _gradient(
    image: Tensor,  # [n, D]
    text: Tensor,  # [m, D]
    scale: Tensor,
    row_lse: Tensor,  # float64 [n]
    column_lse: Tensor,  # float64 [m]
    first: int,
    row_weight: float,
    column_weight: float,
    grad: Tensor | None = None,  # of the loss: it belongs before the rounding to the dtype of image
) -> tuple[Tensor, Tensor, Tensor]:
    """d_image in the dtype of image; d_text and d_scale in float32 (float64), as others may add to them."""
    tiles = _tiles(image, text, scale)
    gradients = _Gradients(tiles)
    largest = max(abs(row_weight), abs(column_weight)) or 1.0
    for cut in tiles.over("clip", first, gradients=True):
        tile = tiles.gradient(cut, row_lse, column_lse, row_weight / largest, column_weight / largest)
        gradients.add(cut, tile)
    factor = largest if grad is None else largest * grad.to(tiles.dtype)
    d_scale = (tiles.sums[0] * factor / tiles.gain).to(tiles.dtype)
    d_image, d_text = gradients.times(factor)
    return d_image.to(image.dtype), d_text, d_scale


def _fake_gradient(image, text, scale, row_lse, column_lse, first, row_weight, column_weight, grad=None):
    dtype = wide(image.dtype)
    d_image = image.new_empty(image.shape)
    return d_image, text.new_empty(text.shape, dtype=dtype), image.new_empty((), dtype=dtype)


contrastive_gradient = define(
    "contrastive_gradient(Tensor image, Tensor text, Tensor scale, Tensor row_lse, Tensor column_lse,"
    " int first, float row_weight, float column_weight, Tensor? grad=None) -> (Tensor, Tensor, Tensor)",
    run=_gradient,
    fake=_fake_gradient,
)


def _above(lse: Tensor, own: Tensor, exact: Tensor) -> Tensor:
    """lse - own if that logit were `exact` in both: log(1 + (exp(lse - own) - 1) exp(own - exact))."""
    above = (lse - own).clamp_min(0)
    log_others = above + (-torch.expm1(-above)).log()  # less own
    return F.softplus(log_others + (own - exact), threshold=40)


@_exactly
def _loss(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _tiles(image, text, scale)
    row_lse, column_lse, own = _lse_of(tiles, 0)
    exact = tiles.own_products()
    if exact is None:
        loss = ((row_lse + column_lse) / 2 - own).mean()
    else:
        exact = exact.double() * tiles.scale.double()
        loss = ((_above(row_lse, own, exact) + _above(column_lse, own, exact)) / 2).mean()
    return loss.to(wide(image.dtype)), row_lse, column_lse


def _fake_loss(image, text, scale):
    return image.new_empty((), dtype=wide(image.dtype)), *_fake_lse(image, text, scale, 0)[:2]


contrastive_loss = define(
    "contrastive_loss(Tensor image, Tensor text, Tensor scale) -> (Tensor, Tensor, Tensor)",
    run=_loss,
    fake=_fake_loss,
)


def _save(ctx, inputs, output) -> None:
    loss, row_lse, column_lse = output
    ctx.mark_non_differentiable(row_lse, column_lse)
    ctx.save_for_backward(*inputs, row_lse, column_lse)


def _backward(ctx, grad, grad_row_lse, grad_column_lse):
    image, text, scale, row_lse, column_lse = ctx.saved_tensors
    weight = 0.5 / image.shape[0]
    d_image, d_text, d_scale = contrastive_gradient(
        image, text, scale, row_lse, column_lse, 0, weight, weight, grad
    )
    return d_image, d_text.to(text.dtype), d_scale.to(scale.dtype)


differentiate(contrastive_loss, save=_save, backward=_backward)


def _refuse(ctx, *grads):
    raise NotImplementedError(
        'the fused contrastive losses have one derivative, and of the loss alone; use impl="reference"'
    )


for _op in (contrastive_lse, contrastive_gradient):
    differentiate(_op, save=lambda ctx, inputs, output: None, backward=_refuse)

# ----------------------------------------------------------------------------- gradients in the forward pass


@_exactly
def _sigmoid(
    image: Tensor,  # [n, D]
    text: Tensor,  # [m, D]
    scale: Tensor,
    bias: Tensor,
    first: int,
    negatives_only: bool,
    gradients: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sum over i, j of log(1 + exp(-z L[i, j])) / n, z = 1 at j = first + i (not with negatives_only), or -1.

    There is no normaliser to wait for: each tile gives its part of the gradients at once.
    """
    tiles = _tiles(image, text, scale)
    n = image.shape[0]
    bias = bias.to(tiles.dtype)
    total = _Gradients(tiles) if gradients else None
    for cut in tiles.over("sigmoid", -n if negatives_only else first, gradients):
        tile = tiles.sigmoid(cut, bias, gradients)
        if gradients:
            total.add(cut, tile)
    loss, d_scale, d_bias = (tiles.sums / n).to(tiles.dtype)
    d_image, d_text = total.times(1 / n) if gradients else (loss.new_empty(0), loss.new_empty(0))
    return loss.clone(), d_image, d_text, d_scale.clone(), d_bias.clone()


def _fake_sigmoid(image, text, scale, bias, first, negatives_only, gradients=True):
    number = functools.partial(image.new_empty, (), dtype=wide(image.dtype))
    d_image, d_text = (
        features.new_empty(features.shape if gradients else (0,), dtype=wide(image.dtype))
        for features in (image, text)
    )
    return number(), d_image, d_text, number(), number()


sigmoid_loss = define(
    "sigmoid_loss(Tensor image, Tensor text, Tensor scale, Tensor bias, int first, bool negatives_only,"
    " bool gradients=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_sigmoid,
    fake=_fake_sigmoid,
)


@_exactly
def _soft(
    image: Tensor,  # [n, D]
    text: Tensor,  # [n, D]
    scale: Tensor,
    gradients: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean over i of the cross-entropies of L[i, :] and of L[:, i] against softmax(A[i, :]), halved.

    A = scale (I I^T + T T^T) / 2 is symmetric: exp(A[i, j] - lse_j) weighs L[i, j] in the other direction.
    """
    tiles = _tiles(image, text, scale)
    n = image.shape[0]
    # From the products that tiles.soft sees: those of the kernels for Hopper are cut off elsewhere, and the
    # loss of an easy pair is L - lse, near 0.
    row_lse, column_lse, alike_lse, unused = (_running(n, tiles) for _ in range(4))
    for cut in tiles.over("soft", 0, gradients):
        tiles.lse(tiles.products(cut), cut.own, 1.0, row_lse[cut.rows], column_lse[cut.columns])
        tiles.lse(tiles.alike(cut), cut.own, 0.5, alike_lse[cut.rows], unused[cut.columns])
    total = _Gradients(tiles) if gradients else None
    for cut in tiles.over("soft", 0, gradients):
        rows, columns, _ = cut
        tile = tiles.soft(
            cut, row_lse[rows], column_lse[columns], alike_lse[rows], alike_lse[columns], gradients
        )
        if gradients:
            total.add(cut, tile)
    loss, d_scale, _ = (tiles.sums / (2 * n)).to(tiles.dtype)
    d_image, d_text = total.times(0.5 / n) if gradients else (loss.new_empty(0), loss.new_empty(0))
    return loss.clone(), d_image, d_text, d_scale.clone()


def _fake_soft(image, text, scale, gradients=True):
    return _fake_sigmoid(image, text, scale, None, 0, False, gradients)[:4]


soft_contrastive_loss = define(
    "soft_contrastive_loss(Tensor image, Tensor text, Tensor scale, bool gradients=True)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    run=_soft,
    fake=_fake_soft,
)


def _save_gradients(ctx, inputs, output) -> None:
    ctx.dtypes = [value.dtype for value in inputs if isinstance(value, Tensor)]
    ctx.others = len(inputs) - len(ctx.dtypes)
    ctx.given = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _from_saved(ctx, grad, *unused):
    if torch.is_grad_enabled():  # create_graph=True: what is kept would pass for a constant
        _refuse(ctx)
    if not ctx.given:
        raise RuntimeError("gradients: expected True, as the loss is differentiated, got False")
    saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *((grad * value).to(dtype) for value, dtype in saved), *(None,) * ctx.others


differentiate(sigmoid_loss, save=_save_gradients, backward=_from_saved)
differentiate(soft_contrastive_loss, save=_save_gradients, backward=_from_saved)
