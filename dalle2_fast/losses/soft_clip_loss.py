"""CLIP's contrastive loss with soft targets."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.losses.clip_loss import ClipLoss
from dalle2_fast.losses.distributed import Gather

__all__ = ["SoftClipLoss"]


class SoftClipLoss(ClipLoss):
    """`ClipLoss` with soft targets: similar pairs are not pushed fully apart.

    The targets are softmax(scale (I I^T + T T^T) / 2), held fixed; see `functional.soft_contrastive_loss`.
    With several processes, each gathers images and texts and computes the loss of the whole batch.

    Args:
        local_loss: has to be False if world_size > 1.
        gather_with_grad: whether gradients flow through the gathered features; see `ClipLoss`.
        cache_labels: accepted for compatibility, without effect: there are no labels to cache.
        rank: this process's rank in torch.distributed's default process group.
        world_size: the size of that group, >= 1. For 1 the group need not exist.
        use_horovod: only False is supported.
        impl: "auto", "reference" or "fused", as in `functional.soft_contrastive_loss`.

    The call takes and returns what a call of `ClipLoss` does; logit_bias cancels here, too.

    Raises:
        NotImplementedError: local_loss=True in a call with several processes, or use_horovod=True.
        TypeError, ValueError: as `ClipLoss` does.

    Source: Shariatnia, "Simple CLIP", 2021 (github.com/moein-shariatnia/OpenAI-CLIP), where the targets carry
    a gradient.

    Example:
        >>> import torch
        >>> features = torch.eye(4)
        >>> loss = SoftClipLoss()
        >>> round(loss(features, features, logit_scale=10.0).item(), 4)
        0.0015
    """

    def forward(
        self,
        image_features: Tensor,  # [n, D]
        text_features: Tensor,  # [n, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self.world_size > 1:
            if self.local_loss:
                raise NotImplementedError("SoftClipLoss: expected local_loss = False, got True")
            image_features, text_features, logit_scale, logit_bias = self.prepare(
                image_features, text_features, logit_scale, logit_bias, int(self.gather_with_grad)
            )
            image_features = Gather.apply(image_features, self.gather_with_grad)
            text_features = Gather.apply(text_features, self.gather_with_grad)
        loss = functional.soft_contrastive_loss(image_features, text_features, logit_scale, impl=self.impl)
        loss = loss if logit_bias is None else loss + 0 * torch.as_tensor(logit_bias).reshape(())
        return {"contrastive_loss": loss} if output_dict else loss
