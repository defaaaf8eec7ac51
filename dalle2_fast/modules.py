"""Thin modules around the ops. Each has the parameters, and so the state_dict, of the module it replaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle2_fast import functional


class GroupNormSiLU(nn.GroupNorm):
    """`nn.GroupNorm`, an optional scale and shift per sample, and SiLU in one op.

    y = silu(gn(x) * (1 + scale) + shift), see `functional.group_norm_silu`. The state_dict is that of
    `nn.GroupNorm`.

    Args:
        num_groups: number of groups, a divisor of num_channels.
        num_channels: number of channels C.
        eps: number >= 0 that is added to the variance.
        affine: whether the norm has a weight and a bias [C].
        device: device of the parameters.
        dtype: dtype of the parameters.
        activation: "silu" or None; None makes a plain norm.
        impl: "auto", "reference" or "fused", see `functional`.

    Source: Wu and He, 1803.08494 (group norm); Dhariwal and Nichol, 2105.05233, equation 4 (scale and shift).

    Example:
        >>> norm = GroupNormSiLU(num_groups=4, num_channels=8)
        >>> norm(torch.randn(2, 8, 4, 4), scale=torch.randn(2, 8)).shape
        torch.Size([2, 8, 4, 4])
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
        """`functional.group_norm_silu` with this module's parameters; its errors are those of the function.

        Args:
            x: floating [N, C, *].
            scale: FiLM scale [N, C]. None means 0.
            shift: FiLM shift [N, C]. None means 0.

        Returns:
            [N, C, *] in the dtype and memory format of x.
        """
        return functional.group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, scale, shift, self.activation, self.impl
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` with 3x3 filters and padding 1, optionally of the doubled image, plus a residual.

    See `functional.conv3x3`. The state_dict is that of `nn.Conv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        bias: whether there is an offset per output channel.
        device: device of the parameters.
        dtype: dtype of the parameters.
        impl: "auto", "reference" or "fused", see `functional`.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", 1509.09308, section 4.1.

    Example:
        >>> convolution = Conv3x3(4, 8)
        >>> convolution(torch.randn(1, 4, 6, 6), residual=torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device, dtype=dtype)
        self.impl = impl

    def forward(
        self,
        x: Tensor,  # [N, C_in, H, W]
        residual: Tensor | None = None,  # [N, C_out, H, W]
        upsample: bool = False,
    ) -> Tensor:  # [N, C_out, H, W]
        """`functional.conv3x3` with this module's parameters; its errors are those of the function.

        Args:
            x: floating [N, C_in, H, W].
            residual: is added to the result, of its shape. None means 0.
            upsample: whether the height and width of x are doubled first, by repeating pixels.

        Returns:
            [N, C_out, H, W] in the dtype of x; H and W are doubled with `upsample`.
        """
        return functional.conv3x3(x, self.weight, self.bias, residual, upsample, self.impl)
