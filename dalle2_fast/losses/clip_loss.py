"""CLIP's contrastive loss for training on one process or many, as a replacement of open_clip's class.

    loss = 1/(2N) sum over i of (row_lse[i] - L[i, i]) + (column_lse[i] - L[i, i]),   L = scale I T^T

The gradients of open_clip's distributed modes have different sizes, and each is reproduced. g is the gradient
that reaches the loss of one process, usually 1; "true" is the gradient of the loss of the whole batch; there
are W processes:

    local_loss  gather_with_grad  value               gradient of the image and the text features
    False       False             of the batch        g true
    False       True              of the batch        (sum of every g) true, hence W true
    True        True              of the local pairs  of the sum over processes of g times their losses, hence
                                                      W true
    True        False             of the local pairs  g times: for images, that of the local row terms only;
                                                      for texts, that of the local column terms only.
                                                      It is not the gradient of any loss.

DistributedDataParallel and FSDP divide by W. The gradient of logit_scale is g true if local_loss=False. If it
is True, every process gets the mean over processes of open_clip's gradients, which is what those wrappers
make of them.
"""

from __future__ import annotations

from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.losses.distributed import ContrastiveLoss
from dalle2_fast.losses.process_group import DistributedLoss

__all__ = ["ClipLoss"]


class ClipLoss(DistributedLoss):
    """The symmetric contrastive loss with the constructor and the call of open_clip's `ClipLoss`.

    Args:
        local_loss: whether each process returns the loss of its own pairs instead of that of the whole batch;
            see the table in the docstring of this module. Without effect for world_size=1.
        gather_with_grad: whether gradients flow through the gathered features; see the table in the docstring
            of this module. Without effect for world_size=1.
        cache_labels: accepted for compatibility, without effect: there are no labels to cache.
        rank: this process's rank in torch.distributed's default process group.
        world_size: the size of that group, >= 1. For 1 the group need not exist.
        use_horovod: only False is supported.
        impl: "auto", "reference" or "fused", as in `functional.contrastive_loss`.

    Call:
        image_features: floating [n, D], the images of this process; n and D are equal on every process. The
            dtype is float32, float64, float16 or bfloat16.
        text_features: floating [n, D]; row i belongs to row i of image_features.
        logit_scale: number or scalar tensor.
        logit_bias: number, scalar tensor or None. It cancels: the value and the gradients do not depend on
            it, and its gradient is 0.
        output_dict: return {"contrastive_loss": loss} instead of the loss.

    Returns:
        A float32 scalar (float64 for float64 features). With several processes, every process has to take
        part in the backward pass. The gradients g that reach the loss may differ between processes, also in
        sign, and be 0. Where their signs differ, local_loss=True costs one more pass over the logits.

    Raises:
        ValueError: an argument has the wrong value or shape, or rank and world_size are not those of the
            process group.
        TypeError: a feature or scalar has the wrong type or dtype.
        NotImplementedError: use_horovod=True.
        RuntimeError: world_size > 1 without a process group, or another process has raised.

    Source: Radford et al., 2103.00020, figure 3; the distributed modes are open_clip's.

    Example:
        >>> import torch
        >>> features = torch.eye(4)
        >>> loss = ClipLoss()
        >>> round(loss(features, features, logit_scale=5.0).item(), 4)
        0.02
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__(cache_labels, rank, world_size, impl)
        if use_horovod:
            raise NotImplementedError("ClipLoss: expected use_horovod = False, got True: no horovod support")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.use_horovod = False

    def forward(
        self,
        image_features: Tensor,  # [n, D]
        text_features: Tensor,  # [n, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self.world_size == 1:
            loss = functional.contrastive_loss(
                image_features, text_features, logit_scale, logit_bias, impl=self.impl
            )
        else:
            mode = 2 * bool(self.local_loss) + bool(self.gather_with_grad)
            image, text, scale, bias = self.prepare(
                image_features, text_features, logit_scale, logit_bias, mode
            )
            loss = ContrastiveLoss.apply(
                image, text, scale, self.local_loss, self.gather_with_grad, self.impl
            )
            loss = loss if bias is None else loss + 0 * bias
        return {"contrastive_loss": loss} if output_dict else loss
