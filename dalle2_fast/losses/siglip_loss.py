"""SigLIP's sigmoid loss for training on one process or many, as a replacement of open_clip's class."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.losses.distributed import SigmoidLoss
from dalle2_fast.losses.process_group import DistributedLoss

__all__ = ["SigLipLoss"]

_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(DistributedLoss):
    """The pairwise sigmoid loss with the constructor and the call of open_clip's `SigLipLoss`.

    With several processes, the value is the loss of the local images against every text, divided by n; its
    mean over processes is the loss of the batch. The gradients are those of the sum over processes of g times
    their losses, where g is the gradient that reaches the loss of a process. The gradients of the scale and
    the bias are those of g times the local loss only.

    Args:
        cache_labels: accepted for compatibility, without effect: there are no labels to cache.
        rank: this process's rank in torch.distributed's default process group.
        world_size: the size of that group, >= 1. For 1 the group need not exist.
        dist_impl: how the texts are exchanged: "bidir" (also for None: both ways round the ring, at most two
            text blocks of other processes at a time), "shift" (one way round the ring), "reduce" (a broadcast
            from each process in turn) or "gather" (all at once). The values and gradients are the same.
        chunk_size: accepted for compatibility, without effect: the fused loss never holds all logits.
        impl: "auto", "reference" or "fused", as in `functional.sigmoid_loss`.

    Call:
        image_features: floating [n, D], the images of this process; n and D are equal on every process. The
            dtype is float32, float64, float16 or bfloat16.
        text_features: floating [n, D]; row i belongs to row i of image_features.
        logit_scale: number or scalar tensor.
        logit_bias: number, scalar tensor, or None for 0.
        output_dict: return {"contrastive_loss": loss} instead of the loss.

    Returns:
        A float32 scalar (float64 for float64 features). The gradients are computed in the forward pass. With
        several processes, every process has to take part in the backward pass.

    Raises:
        ValueError: an argument has the wrong value or shape, or rank and world_size are not those of the
            process group.
        TypeError: a feature or scalar has the wrong type or dtype.
        RuntimeError: world_size > 1 without a process group, or another process has raised.

    Source: Zhai et al., 2303.15343, equation 1; the ways of exchange are open_clip's.

    Example:
        >>> import torch
        >>> features = torch.eye(4)
        >>> loss = SigLipLoss()
        >>> round(loss(features, features, logit_scale=10.0, logit_bias=-5.0).item(), 4)
        0.0269
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__(cache_labels, rank, world_size, impl)
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in _EXCHANGES:
            names = ", ".join(map(repr, _EXCHANGES))
            raise ValueError(f"SigLipLoss: dist_impl: expected one of {names}, got {dist_impl!r}")

    def forward(
        self,
        image_features: Tensor,  # [n, D]
        text_features: Tensor,  # [n, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        logit_bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = functional.sigmoid_loss(
                image_features, text_features, logit_scale, logit_bias, impl=self.impl
            )
        else:
            mode = _EXCHANGES.index(self.dist_impl)
            arguments = self.prepare(image_features, text_features, logit_scale, logit_bias, mode)
            tracked = torch.is_grad_enabled() and any(value.requires_grad for value in arguments)
            loss = SigmoidLoss.apply(*arguments, self.dist_impl, tracked, self.impl)
        return {"contrastive_loss": loss} if output_dict else loss
