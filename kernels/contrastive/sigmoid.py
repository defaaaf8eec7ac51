"""loss = sum_ij log(1 + exp(-z[i, j] L[i, j])) / n,  L = scale I T^T + bias,  z = 1 for positives, else -1

SigLIP's pairwise sigmoid loss. It has no normaliser that needs the whole row first, so each tile gives its
part of the loss and of the gradients in one pass.
"""

from __future__ import annotations

import functools

from torch import Tensor

from .._op import define, differentiate
from ._backend import full_precision, make_backend
from ._gradients import FeatureGradients, save_gradients, scale_saved_gradients
from ._tiles import compute_dtype


@full_precision
def _sigmoid(
    image: Tensor,  # [n, D]
    text: Tensor,  # [m, D]
    scale: Tensor,
    bias: Tensor,
    first: int,
    negatives_only: bool,
    gradients: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The positive of row i is column first + i; with negatives_only there are none."""
    backend = make_backend(image, text, scale)
    n = image.shape[0]
    bias = bias.to(backend.dtype)
    total = FeatureGradients(backend) if gradients else None
    for tile in backend.tiles("sigmoid", -n if negatives_only else first, gradients):
        gradient = backend.sigmoid(tile, bias, gradients)
        if total is not None:
            total.add(tile, gradient)
    loss, d_scale, d_bias = (backend.sums / n).to(backend.dtype)
    d_image, d_text = total.times(1 / n) if total is not None else (loss.new_empty(0), loss.new_empty(0))
    return loss.clone(), d_image, d_text, d_scale.clone(), d_bias.clone()


def fake_sigmoid(image, text, scale, bias, first, negatives_only, gradients=True):
    scalar = functools.partial(image.new_empty, (), dtype=compute_dtype(image.dtype))
    d_image, d_text = (
        features.new_empty(features.shape if gradients else (0,), dtype=compute_dtype(image.dtype))
        for features in (image, text)
    )
    return scalar(), d_image, d_text, scalar(), scalar()


sigmoid_loss = define(
    "sigmoid_loss(Tensor image, Tensor text, Tensor scale, Tensor bias, int first, bool negatives_only,"
    " bool gradients=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_sigmoid,
    fake=fake_sigmoid,
)
differentiate(sigmoid_loss, save=save_gradients, backward=scale_saved_gradients)
