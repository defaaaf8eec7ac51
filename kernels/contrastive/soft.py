"""loss = mean_i of the cross-entropies of L[i, :] and of L[:, i] against softmax(A[i, :]), halved

L = scale I T^T are the logits, A = scale (I I^T + T T^T) / 2 those of the soft targets. A is symmetric, so
its log-sum-exps serve both directions.
"""

from __future__ import annotations

from torch import Tensor

from .._op import define, differentiate
from ._backend import full_precision, make_backend
from ._gradients import FeatureGradients, save_gradients, scale_saved_gradients
from .clip import running_lse
from .sigmoid import fake_sigmoid


@full_precision
def _soft(
    image: Tensor,  # [n, D]
    text: Tensor,  # [n, D]
    scale: Tensor,
    gradients: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = make_backend(image, text, scale)
    n = image.shape[0]
    # From the same products that backend.soft uses, not from lse_at_once: Hopper's kernels truncate sums at
    # other places, and the loss of an easy pair is L - lse, which is near 0.
    row_lse, column_lse, similarity_lse, unused = (running_lse(n, backend) for _ in range(4))
    for tile in backend.tiles("soft", 0, gradients):
        rows, columns, offset = tile
        backend.lse(backend.products(tile), offset, 1.0, row_lse[rows], column_lse[columns])
        backend.lse(backend.similarity(tile), offset, 0.5, similarity_lse[rows], unused[columns])
    total = FeatureGradients(backend) if gradients else None
    for tile in backend.tiles("soft", 0, gradients):
        rows, columns, _ = tile
        lse = row_lse[rows], column_lse[columns], similarity_lse[rows], similarity_lse[columns]
        gradient = backend.soft(tile, *lse, gradients)
        if total is not None:
            total.add(tile, gradient)
    loss, d_scale, _ = (backend.sums / (2 * n)).to(backend.dtype)
    d_image, d_text = total.times(0.5 / n) if total is not None else (loss.new_empty(0), loss.new_empty(0))
    return loss.clone(), d_image, d_text, d_scale.clone()


def _fake_soft(image, text, scale, gradients=True):
    return fake_sigmoid(image, text, scale, None, 0, False, gradients)[:4]


soft_contrastive_loss = define(
    "soft_contrastive_loss(Tensor image, Tensor text, Tensor scale, bool gradients=True)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    run=_soft,
    fake=_fake_soft,
)
differentiate(soft_contrastive_loss, save=save_gradients, backward=scale_saved_gradients)
