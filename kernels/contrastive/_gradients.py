"""Gradients of the features from those of the logits, and the autograd of losses that save them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import Backend
from ._tiles import Tile, matmul_into


class FeatureGradients:
    """d_image = scale factor G T and d_text = scale factor G^T I, accumulated one tile of G at a time."""

    def __init__(self, backend: Backend):
        self.backend = backend
        image, text = backend.image, backend.text
        self.image = torch.empty(image.shape, dtype=backend.dtype, device=image.device)
        self.text = torch.empty(text.shape, dtype=backend.dtype, device=image.device)

    def add(self, tile: Tile, gradient: Tensor) -> None:
        image, text, (rows, columns, _) = self.backend.image, self.backend.text, tile
        matmul_into(self.image[rows], gradient, text[columns], add=columns.start > 0)
        matmul_into(self.text[columns], gradient.T, image[rows], add=rows.start > 0)

    def times(self, factor: Tensor | float) -> tuple[Tensor, Tensor]:
        """Small factors come last: G times 1 / 2n would be out of the range of half precision."""
        factor = factor * self.backend.scale / self.backend.gradient_scale
        return self.image.mul_(factor), self.text.mul_(factor)


def refuse_derivative(ctx, *grads):
    raise NotImplementedError(
        "the fused contrastive losses have only one derivative, and only the loss has it; use "
        'impl="reference"'
    )


def save_nothing(ctx, inputs, output) -> None:
    pass


def save_gradients(ctx, inputs, output) -> None:
    """Of an op (*tensors, ..., gradients: bool) -> (loss, one gradient per tensor)."""
    ctx.dtypes = [value.dtype for value in inputs if isinstance(value, Tensor)]
    ctx.other_inputs = len(inputs) - len(ctx.dtypes)
    ctx.has_gradients = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def scale_saved_gradients(ctx, grad, *unused):
    if torch.is_grad_enabled():  # create_graph=True: the saved gradients would be taken for constants
        refuse_derivative(ctx)
    if not ctx.has_gradients:
        raise RuntimeError("gradients: expected True because the loss is differentiated, got False")
    saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *((grad * value).to(dtype) for value, dtype in saved), *(None,) * ctx.other_inputs
