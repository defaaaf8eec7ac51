"""The parts of the U-Net: residual and attention blocks, the layout of the first grid, the fine level."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.functional import cross_attention
from dalle2_fast.modules import Conv3x3, GroupNormSiLU


class Layout(nn.Module):
    """A linear map of the embedding for each cell of a grid: [B, E] -> [B, C, grid_size, grid_size].

    Scale and shift (FiLM) are the same for every cell. A network that is conditioned on "top left" by them
    alone first has to find out, through noise, where the top left is. This layer conditions every cell
    separately. Its initial output is an embedding of the position: cosine waves along the rows and columns.

    Args:
        embed_dim: width E of the embedding.
        channels: channels C of the output.
        grid_size: side of the grid in cells.

    Example:
        >>> Layout(embed_dim=4, channels=8, grid_size=2)(torch.zeros(3, 4)).shape
        torch.Size([3, 8, 2, 2])
    """

    def __init__(self, embed_dim: int, channels: int, grid_size: int):
        super().__init__()
        self.shape = (channels, grid_size, grid_size)
        self.cells = nn.Linear(embed_dim, channels * grid_size**2)
        place = (torch.arange(grid_size) + 0.5) / grid_size
        wave = torch.cos(math.pi * place * (torch.arange(channels)[:, None] // 2 % grid_size))
        along_rows = (torch.arange(channels) % 2 == 0)[:, None, None]
        positions = 0.5 * torch.where(along_rows, wave[:, :, None], wave[:, None, :])
        nn.init.zeros_(self.cells.weight)
        with torch.no_grad():
            self.cells.bias.copy_(positions.flatten())

    def forward(self, embed: Tensor) -> Tensor:
        return self.cells(embed).unflatten(1, self.shape)


class FineLevel(nn.Module):
    """Residual blocks on small patches that correct the image of a network on large patches.

    A patch of p x p pixels leaves a network as a linear map of its channels. With 8 x 8 pixels these channels
    cannot hold where an edge runs, however long the network is trained. The coarse network therefore decides
    what is where, and this level draws it, from the noisy image, the coarse image and the last features of
    the coarse network. Its initial output is the coarse image, so that it can be added to a trained network.

    Args:
        in_channels: channels of the noisy image.
        out_channels: channels of the output.
        coarse_channels: channels of the last features of the coarse network.
        ratio: cells of this level along one side of a cell of the coarse network.
        patch_size: side of a small patch in pixels.
        channels: width of the blocks.
        layers: the number of residual blocks.
        embed_dim: width of the embedding of time and classes.
        num_groups: groups of the group norms.
        film: whether the embedding scales and shifts (True) or is added (False).

    Example:
        >>> level = FineLevel(3, 3, coarse_channels=8, ratio=2, patch_size=1, channels=4, layers=1,
        ...                   embed_dim=6, num_groups=2, film=True)
        >>> coarse, features = torch.zeros(1, 3, 4, 4), torch.zeros(1, 8, 2, 2)
        >>> level(torch.zeros(1, 3, 4, 4), coarse, features, torch.zeros(1, 6)).shape
        torch.Size([1, 3, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        coarse_channels: int,
        ratio: int,
        patch_size: int,
        channels: int,
        layers: int,
        embed_dim: int,
        num_groups: int,
        film: bool,
    ):
        super().__init__()
        self.patch_size, self.ratio = patch_size, ratio
        self.conv_in = nn.Conv2d((in_channels + out_channels) * patch_size**2, channels, 1)
        self.lift = nn.Conv2d(coarse_channels, channels * ratio**2, 1)
        self.blocks = nn.ModuleList(
            ResBlock(channels, channels, embed_dim, num_groups, film) for _ in range(layers)
        )
        self.norm_out = GroupNormSiLU(num_groups, channels)
        self.conv_out = Conv3x3(channels, out_channels * patch_size**2)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: Tensor,  # [B, in_channels, H, W]
        coarse: Tensor,  # [B, out_channels, H, W], image of the coarse network
        features: Tensor,  # [B, coarse_channels, H / (ratio patch_size), W / (ratio patch_size)]
        embed: Tensor,  # [B, embed_dim]
    ) -> Tensor:  # [B, out_channels, H, W]
        """The corrected image."""
        hidden = F.pixel_unshuffle(torch.cat([sample, coarse], dim=1), self.patch_size)
        hidden = self.conv_in(hidden.contiguous(memory_format=torch.channels_last))
        hidden = hidden + F.pixel_shuffle(self.lift(features), self.ratio)
        for block in self.blocks:
            hidden = block(hidden, embed)
        return coarse + F.pixel_shuffle(self.conv_out(self.norm_out(hidden)), self.patch_size)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(resample(silu(norm(x))))))), with an embedding as FiLM or as an addition.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        embed_dim: width of the embedding of time and classes.
        num_groups: groups of the group norms.
        film: whether the embedding scales and shifts the second norm (True) or is added before it (False).
        resample: "down" halves the resolution, "up" doubles it, None keeps it.
        dropout: dropout probability before the second convolution.

    Source: Dhariwal and Nichol, "ADM", 2105.05233, section 3.

    Example:
        >>> block = ResBlock(4, 8, embed_dim=6, num_groups=2, film=True, resample="down")
        >>> block(torch.randn(1, 4, 4, 4), torch.randn(1, 6)).shape
        torch.Size([1, 8, 2, 2])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_dim: int,
        num_groups: int,
        film: bool,
        resample: str | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.film = film
        self.resample = resample
        self.dropout = dropout
        self.norm1 = GroupNormSiLU(num_groups, in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.embed = nn.Linear(embed_dim, 2 * out_channels if film else out_channels)
        self.norm2 = GroupNormSiLU(num_groups, out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # an untrained block is the identity (ADM)
        nn.init.zeros_(self.conv2.bias)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        embed: Tensor,  # [B, E], after SiLU, which is applied once for all blocks
    ) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W], at the new resolution where there is one."""
        hidden = self.norm1(x)
        if self.resample == "down":
            hidden = F.avg_pool2d(hidden, 2)
        hidden = self.conv1(hidden, upsample=self.resample == "up")
        if self.film:
            scale, shift = self.embed(embed).chunk(2, dim=1)
            hidden = self.norm2(hidden, scale=scale, shift=shift)
        else:
            hidden = self.norm2(hidden + self.embed(embed)[:, :, None, None])
        if self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout, self.training)
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv2(hidden, residual=self.skip(x))

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for convolution in (self.conv1, self.conv2):
            if type(convolution) is nn.Conv2d:  # a pickle of version 0.1.0
                convolution.__class__, convolution.impl = Conv3x3, "auto"


class AttentionBlock(nn.Module):
    """x + project(attention): the tokens of the image attend to [context, image] in one softmax.

    Args:
        channels: channels of the image, a multiple of head_dim.
        head_dim: width of an attention head.
        cross_dim: width of the context; None for self-attention only.
        num_groups: groups of the group norm.

    Attributes:
        impl: implementation of the attention, "auto", "reference" or "fused", see `functional`.

    Source: Nichol et al., "GLIDE", 2112.10741, section 2.4.

    Example:
        >>> block = AttentionBlock(8, head_dim=4, cross_dim=6, num_groups=2)
        >>> keys, values = block.encode_context(torch.randn(1, 5, 6))
        >>> keys.shape, block(torch.randn(1, 8, 2, 2), (keys, values)).shape
        (torch.Size([1, 2, 5, 4]), torch.Size([1, 8, 2, 2]))
    """

    impl: str = "auto"  # of the class, because pickles of version 0.1.0 do not have it

    def __init__(self, channels: int, head_dim: int, cross_dim: int | None, num_groups: int):
        super().__init__()
        self.heads = channels // head_dim
        self.norm = GroupNormSiLU(num_groups, channels, activation=None)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(cross_dim, 2 * channels) if cross_dim is not None else None
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def encode_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values [B, heads, S, head_dim] of a context [B, S, cross_dim]."""
        return _split_heads(self.context_kv(context), 2, self.heads)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        context: tuple[Tensor, Tensor] | None = None,  # keys, values [B, heads, S, head_dim]
        context_mask: Tensor | None = None,  # bool [B, S]
    ) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        # Neither this reshape nor the one at the end copies a channels_last x.
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, H * W, C]
        q, k, v = _split_heads(self.qkv(tokens), 3, self.heads)
        if context is None:
            out = cross_attention(q, k, v, impl=self.impl)
        else:
            out = cross_attention(
                q, *context, context_mask=context_mask, image_k=k, image_v=v, impl=self.impl
            )
        out = self.project(out.transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


def _split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, T, parts * heads * D] -> parts tensors [B, heads, T, D] (views)."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
