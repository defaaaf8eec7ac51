"""loss = mean_i (log sum_j exp L[i, j] + log sum_j exp L[j, i]) / 2 - L[i, i],  L = scale I T^T

CLIP's symmetric contrastive loss (InfoNCE) in memory O(N D) and a workspace of bounded size: the N^2 logits
exist one tile at a time. Both directions of the softmax use one matrix product, and one exponential per
element serves both. The backward pass computes the tiles again: 8 N^2 D operations in total, against 12 where
each direction has its own logits.

The rows may be one process's part of the batch: n local rows against all m texts, where `first` is the index
of row 0's text. The arithmetic is float32 (float64 for float64 features), also under autocast, and equal
calls give equal bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import define, differentiate
from ._backend import Backend, full_precision, make_backend
from ._gradients import FeatureGradients, refuse_derivative, save_nothing
from ._tiles import compute_dtype


def running_lse(size: int, backend: Backend) -> Tensor:
    return backend.sums.new_full((size,), -math.inf)


def _compute_lse(backend: Backend, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """row_lse [n], column_lse [m] and L[i, first + i] [n], NaN for a row whose text is missing; float64."""
    n, m = backend.image.shape[0], backend.text.shape[0]
    at_once = backend.lse_at_once(first)
    if at_once is not None:
        row_lse, column_lse, positives = at_once
    else:
        row_lse, column_lse = running_lse(n, backend), running_lse(m, backend)
        positives = torch.full((n,), math.nan, dtype=backend.dtype, device=row_lse.device)
        # The tiles of the backward pass: for another shape cuBLAS may choose another kernel, which may round
        # products differently. Then L - lse of an easy pair, which is small, would not be the same.
        for tile in backend.tiles("clip", first, gradients=True):
            products, offset = backend.products(tile), tile.diagonal_offset
            backend.lse(products, offset, 1.0, row_lse[tile.rows], column_lse[tile.columns])
            if -products.shape[0] < offset < products.shape[1]:
                diagonal = products.diagonal(offset)
                begin = tile.rows.start + max(0, -offset)
                positives[begin : begin + diagonal.shape[0]] = diagonal
    return row_lse, column_lse, (positives * backend.scale).double()


@full_precision
def _lse(image: Tensor, text: Tensor, scale: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return _compute_lse(make_backend(image, text, scale), first)


def _fake_lse(image, text, scale, first=0):
    rows = image.new_empty(image.shape[0], dtype=torch.float64)
    return rows, text.new_empty(text.shape[0], dtype=torch.float64), torch.empty_like(rows)


contrastive_lse = define(
    "contrastive_lse(Tensor image, Tensor text, Tensor scale, int first=0) -> (Tensor, Tensor, Tensor)",
    run=_lse,
    fake=_fake_lse,
)


@full_precision
def _gradient(
    image: Tensor,  # [n, D]
    text: Tensor,  # [m, D]
    scale: Tensor,
    row_lse: Tensor,  # float64 [n]
    column_lse: Tensor,  # float64 [m]
    first: int,
    row_weight: float,
    column_weight: float,
    grad: Tensor | None = None,  # of the loss: multiplied in before the rounding to the dtype of image
) -> tuple[Tensor, Tensor, Tensor]:
    """d_image in the dtype of image; d_text and d_scale, to which others may add, in float32 (float64)."""
    backend = make_backend(image, text, scale)
    gradients = FeatureGradients(backend)
    largest = max(abs(row_weight), abs(column_weight)) or 1.0
    for tile in backend.tiles("clip", first, gradients=True):
        gradient = backend.gradient(tile, row_lse, column_lse, row_weight / largest, column_weight / largest)
        gradients.add(tile, gradient)
    factor = largest if grad is None else largest * grad.to(backend.dtype)
    d_scale = (backend.sums[0] * factor / backend.gradient_scale).to(backend.dtype)
    d_image, d_text = gradients.times(factor)
    return d_image.to(image.dtype), d_text, d_scale


def _fake_gradient(image, text, scale, row_lse, column_lse, first, row_weight, column_weight, grad=None):
    dtype = compute_dtype(image.dtype)
    d_image = image.new_empty(image.shape)
    return d_image, text.new_empty(text.shape, dtype=dtype), image.new_empty((), dtype=dtype)


contrastive_gradient = define(
    "contrastive_gradient(Tensor image, Tensor text, Tensor scale, Tensor row_lse, Tensor column_lse,"
    " int first, float row_weight, float column_weight, Tensor? grad=None) -> (Tensor, Tensor, Tensor)",
    run=_gradient,
    fake=_fake_gradient,
)


def _lse_above_positive(lse: Tensor, positive: Tensor, exact: Tensor) -> Tensor:
    """lse - positive, if the positive logit were `exact` in both.

    log(1 + (exp(lse - positive) - 1) exp(positive - exact))
    """
    above = (lse - positive).clamp_min(0)
    log_negatives = above + (-torch.expm1(-above)).log()  # relative to the positive
    return F.softplus(log_negatives + (positive - exact), threshold=40)


@full_precision
def _loss(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    backend = make_backend(image, text, scale)
    row_lse, column_lse, positive = _compute_lse(backend, 0)
    exact = backend.positive_products()
    if exact is None:
        loss = ((row_lse + column_lse) / 2 - positive).mean()
    else:
        exact = exact.double() * backend.scale.double()
        by_row = _lse_above_positive(row_lse, positive, exact)
        by_column = _lse_above_positive(column_lse, positive, exact)
        loss = ((by_row + by_column) / 2).mean()
    return loss.to(compute_dtype(image.dtype)), row_lse, column_lse


def _fake_loss(image, text, scale):
    return image.new_empty((), dtype=compute_dtype(image.dtype)), *_fake_lse(image, text, scale, 0)[:2]


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
for _op in (contrastive_lse, contrastive_gradient):
    differentiate(_op, save=save_nothing, backward=refuse_derivative)
