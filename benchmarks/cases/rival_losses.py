"""The contrastive losses of other packages, and their formulas in plain torch.

Of these calls, `open_clip_chunked` and `liger_hopper` follow sources of August 2026 and have not been run:
the check before timing has to pass first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_eager(image_features, text_features, logit_scale):
    """Two products and two cross-entropies: what open_clip's ClipLoss computes in one process."""
    scale = logit_scale.to(image_features.dtype)
    labels = torch.arange(len(image_features), device=image_features.device)
    by_row = scale * image_features @ text_features.T
    by_column = scale * text_features @ image_features.T
    return (F.cross_entropy(by_row, labels) + F.cross_entropy(by_column, labels)) / 2


def clip_single_product(image_features, text_features, logit_scale):
    """One matrix product for both directions: the form that a compiler can fuse best."""
    logits = logit_scale * (image_features @ text_features.T).float()
    return (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()).mean() / 2


def sigmoid_eager(image_features, text_features, logit_scale, logit_bias):
    """What open_clip's SigLipLoss computes in one process."""
    logits = logit_scale.to(image_features.dtype) * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def soft_eager(image_features, text_features, logit_scale):
    """Cross-entropies with targets from the similarities within the images and within the texts."""
    scale = logit_scale.to(image_features.dtype)
    with torch.no_grad():
        alike = image_features @ image_features.T + text_features @ text_features.T
        targets = (scale * alike / 2).softmax(1)
    by_row = scale * image_features @ text_features.T
    by_column = scale * text_features @ image_features.T
    return (F.cross_entropy(by_row, targets) + F.cross_entropy(by_column, targets)) / 2


def amp(function: Callable) -> Callable:
    """The same function as trainers call it: float32 features under autocast, which is off on a CPU."""

    def run(**values):
        values = {name: value.float() for name, value in values.items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=values["image_features"].is_cuda):
            return function(**values)

    return run


def open_clip(name: str, **values) -> Tensor:
    """The loss class of open_clip that has this name."""
    from open_clip import loss

    return getattr(loss, name)()(**values)


def open_clip_chunked(**values) -> Tensor:
    """SigLipLoss with 512 rows of logits at a time. open_clip 3.3.0 does not have it yet."""
    from open_clip.loss import SigLipLoss

    if "chunk_size" not in inspect.signature(SigLipLoss).parameters:
        raise RuntimeError("SigLipLoss of this open_clip has no chunk_size")
    return SigLipLoss(chunk_size=512)(**values)


def liger_hopper(image_features, text_features, logit_scale):
    """Liger's linear cross-entropy for Hopper, once per direction: 12 N^2 D operations, N^2 logits stored.

    It takes bfloat16, and numbers of pairs that 256 divides.
    """
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
        LigerFusedLinearCrossEntropySM90Function,
    )

    loss = LigerFusedLinearCrossEntropySM90Function.apply
    labels = torch.arange(len(image_features), device=image_features.device)
    scaled = (logit_scale * image_features).to(image_features.dtype)
    return (loss(scaled, text_features, labels) + loss(text_features, scaled, labels)) / 2


def inf_cl(image_features, text_features, logit_scale):
    """Inf-CL computes one direction of the loss per call, so it is called twice."""
    from inf_cl import cal_flash_loss

    # The scale is multiplied into the features: passed as an argument it needs a process group.
    head = 256 if image_features.shape[1] % 256 == 0 else image_features.shape[1]
    scaled = logit_scale * image_features
    rows = cal_flash_loss(scaled, text_features, head_dim=head)
    columns = cal_flash_loss(text_features, scaled, head_dim=head)
    return (rows + columns).mean() / 2  # cal_flash_loss returns one loss per row
