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
