"""What the U-Net is made of: residual and attention blocks, the layout of the first grid, the fine level."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.functional import cross_attention
from dalle2_fast.modules import GroupNormSiLU


class Layout(nn.Module):
    """Where things go: embedding [B, E] -> [B, C, grid_size, grid_size], linear, apart for each cell.

    Scale and shift (FiLM) say the same to every cell, so a net that is told "top left" by them has to find
    out first where the top left is, through noise. This tells each cell itself. It starts as a position: the
    cosine waves along the rows and along the columns.
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
    """What a net on large patches cannot draw: its image corrected on small ones, by residual blocks alone.

    A patch of p x p pixels leaves the net as a linear map of its `channels` numbers; with 8 x 8 pixels they
    do not hold where an edge runs, however long the net is trained. So the coarse net decides what is where,
    and this one draws it, from the noisy image, the coarse image and the coarse net's last features. It
    starts at the coarse image itself: a trained coarse net can be given one later.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        coarse_channels: int,
        ratio: int,  # cells of this level along one side of a cell of the coarse net
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
        self.conv_out = nn.Conv2d(channels, out_channels * patch_size**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: Tensor,  # [B, in_channels, H, W]
        coarse: Tensor,  # [B, out_channels, H, W], the coarse net's image
        features: Tensor,  # [B, coarse_channels, H / (ratio patch_size), W / (ratio patch_size)]
        embed: Tensor,  # [B, embed_dim]
    ) -> Tensor:  # [B, out_channels, H, W]
        hidden = F.pixel_unshuffle(torch.cat([sample, coarse], dim=1), self.patch_size)
        hidden = self.conv_in(hidden.contiguous(memory_format=torch.channels_last))
        hidden = hidden + F.pixel_shuffle(self.lift(features), self.ratio)
        for block in self.blocks:
            hidden = block(hidden, embed)
        return coarse + F.pixel_shuffle(self.conv_out(self.norm_out(hidden)), self.patch_size)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(resample(silu(norm(x))))))), with the embedding as FiLM or as an addition."""

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
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embed_dim, 2 * out_channels if film else out_channels)
        self.norm2 = GroupNormSiLU(num_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # every block starts as the identity (ADM)
        nn.init.zeros_(self.conv2.bias)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        embed: Tensor,  # [B, E], already through SiLU: one activation for all blocks
    ) -> Tensor:
        hidden = self.norm1(x)
        if self.resample is not None:
            hidden, x = _resample(hidden, self.resample), _resample(x, self.resample)
        hidden = self.conv1(hidden)
        if self.film:
            scale, shift = self.embed(embed).chunk(2, dim=1)
            hidden = self.norm2(hidden, scale=scale, shift=shift)
        else:
            hidden = self.norm2(hidden + self.embed(embed)[:, :, None, None])
        if self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return self.skip(x) + self.conv2(hidden)


def _resample(x: Tensor, direction: str) -> Tensor:
    return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class AttentionBlock(nn.Module):
    """x + project(attention of the image's tokens on [context, image] in one softmax) (GLIDE, section
    2.4)."""

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
        """context [B, S, cross_dim] -> keys, values [B, heads, S, head_dim]."""
        return _split_heads(self.context_kv(context), 2, self.heads)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        context: tuple[Tensor, Tensor] | None = None,  # keys, values [B, heads, S, head_dim]
        context_mask: Tensor | None = None,  # bool [B, S]
    ) -> Tensor:
        # Free of copies when x is channels_last; so is the way back.
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, H * W, C]
        q, k, v = _split_heads(self.qkv(tokens), 3, self.heads)
        if context is None:
            out = cross_attention(q, k, v)
        else:
            out = cross_attention(q, *context, context_mask=context_mask, image_k=k, image_v=v)
        out = self.project(out.transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


def _split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, T, parts * heads * D] -> parts tensors [B, heads, T, D] (views)."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
