"""CLIP's loss over many processes, and its gradient in two passes for batches that do not fit.

Each process has n = N / W rows. The loss it returns is that of its own images and captions against all N, and
its gradient reaches the features of every process. The mean over processes is the loss of the whole batch,
and DDP's or FSDP's mean of the gradients is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.losses import ClipLoss
from dalle2_fast.losses.distributed import Gather
from dalle2_fast.training.parallel.processes import Processes

Features = tuple[Tensor, Tensor, "Tensor | None"]  # images [n, D], captions [n, D], negatives [n, K, D]


def contrastive_loss(
    features: Features,
    negative_mask: Tensor | None,  # bool [n, K]
    scale: Tensor,
    processes: Processes,
) -> Tensor:
    """The loss of the rows of this process, a scalar; see `CLIP.forward` for the negatives."""
    image, text, negatives = features
    rank, world = processes.rank, processes.world_size
    if negatives is None:
        return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)(
            image, text, scale
        )
    # Autocast would round the cosines to bfloat16, see `loss_with_negatives`.
    with torch.autocast(image.device.type, enabled=False):
        images, texts = (Gather.apply(rows, True) if world > 1 else rows for rows in (image, text))
        extra = scale * (negatives @ image[:, :, None]).squeeze(-1)
        if negative_mask is not None:
            extra = extra.masked_fill(~negative_mask, float("-inf"))
        target = torch.arange(len(image), device=image.device) + rank * len(image)
        by_image = F.cross_entropy(torch.cat([scale * image @ texts.T, extra], dim=1), target)
        return (by_image + F.cross_entropy(scale * text @ images.T, target)) / 2


def two_passes(
    features_of: Callable[[Any], Features],
    loss_of: Callable[[Features, Tensor], Tensor],
    logit_scale: Tensor,
    chunks: list[Any],
    run: Callable[..., Any],
    factor: float = 1.0,
) -> Tensor:
    """The gradient of the loss of all rows, with the activations of one chunk at a time (GradCache).

    The first pass computes the features of all chunks without activations, then the loss and its gradient g
    in the features. The second pass computes each chunk again and the gradient of <features, g>. By the chain
    rule their sum is the gradient of the loss.

    Args:
        features_of: of a chunk of rows.
        loss_of: loss of all features and of the scale.
        logit_scale: the parameter, whose exponential is the scale.
        chunks: of the rows of this process.
        run: calls a function within the strategy, see `strategies.Alone.run`.
        factor: on the loss, for float16.

    Returns:
        The loss without the factor.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2101.06983.
    """
    with torch.no_grad():
        passes = [run(features_of, chunk, last=False) for chunk in chunks]
        columns = list(zip(*passes, strict=True))
    features = tuple(None if some[0] is None else torch.cat(some).requires_grad_() for some in columns)
    scale = logit_scale.detach().exp().requires_grad_()
    loss = loss_of(features, scale)
    (loss * factor).backward()
    gradients = [None if each is None else each.grad.split([len(x) for x in some])
                 for each, some in zip(features, columns, strict=True)]  # fmt: skip

    def product(chunk: Any, parts: list[Tensor | None], last: bool) -> Tensor:
        pairs = zip(features_of(chunk), parts, strict=True)
        total = sum((feature.float() * part.float()).sum() for feature, part in pairs if part is not None)
        # The scale is in no chunk: its gradient comes with the last one, for the mean over processes.
        return total + (logit_scale.exp() * scale.grad if last else 0.0)

    for index, chunk in enumerate(chunks):
        last = index == len(chunks) - 1
        parts = [None if each is None else each[index] for each in gradients]
        run(product, chunk, parts, last, last=last).backward()
    return loss.detach()
