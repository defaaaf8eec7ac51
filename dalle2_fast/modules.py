"""Thin modules around the ops. Each has the parameters, so the state_dict, of the module that it replaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle2_fast import functional


class GroupNormSiLU(nn.GroupNorm):
    """`nn.GroupNorm` followed by an optional scale and shift per sample and by SiLU.

    y = silu(gn(x) * (1 + scale) + shift), see `functional.group_norm_silu`. The state_dict is that of
    `nn.GroupNorm`, also for activation=None, which is a plain norm.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "silu",
        impl: str = "auto",
    ) -> None:
        super().__init__(num_groups, num_channels, eps=eps, affine=affine, device=device, dtype=dtype)
        self.activation = activation
        self.impl = impl

    def forward(
        self,
        x: Tensor,  # [N, C, *]
        scale: Tensor | None = None,  # [N, C]
        shift: Tensor | None = None,  # [N, C]
    ) -> Tensor:  # [N, C, *]
        return functional.group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, scale, shift, self.activation, self.impl
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


def _single_process(name: str, world_size: int) -> None:
    if world_size > 1:
        raise NotImplementedError(
            f"{name}: expected world_size = 1, got {world_size}: this version has no distributed loss"
        )


class ClipLoss(nn.Module):
    """The symmetric contrastive loss with the constructor and the call of open_clip's `ClipLoss`.

    With one process `local_loss`, `gather_with_grad` and `cache_labels` change nothing; they are kept so that
    the class drops in.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        _single_process("ClipLoss", world_size)
        if use_horovod:
            raise NotImplementedError("ClipLoss: expected use_horovod = False, got True: no horovod support")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = functional.contrastive_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """The pairwise sigmoid loss with the constructor and the call of open_clip's `SigLipLoss`.

    With one process `cache_labels` and `dist_impl` change nothing; they are kept so that the class drops in.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        _single_process("SigLipLoss", world_size)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = functional.sigmoid_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
