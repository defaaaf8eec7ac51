"""The layers of DALLE2-pytorch's U-Net. The tensors have DALLE2-pytorch's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast import functional
from dalle2_fast.adapters.published.prior_network import COSINE_SCALE, GainNorm
from dalle2_fast.modules import Conv3x3, GroupNormSiLU

CROSS_HEADS, CROSS_DIM_HEAD = 8, 64  # of every cross-attention


class PixelNorm(nn.Module):
    """`GainNorm` of the channels of every pixel [B, C, H, W].

    Example:
        >>> PixelNorm(4)(torch.randn(1, 4, 2, 2)).shape
        torch.Size([1, 4, 2, 2])
    """

    def __init__(self, dim: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], self.g.flatten()).movedim(-1, 1)


class Attention(nn.Module):
    """Attention to a context, or of an image to itself, and to a learned key and value.

    Args:
        dim: width of the tokens.
        context_dim: width of the context; None: the tokens attend to each other, and all heads share one key.
        heads: the number of heads.
        dim_head: width of a head.
        cosine_sim: whether logits are cosines times 16.
        scaled_twice: whether logits are divided by dim_head and not by its root, as from version 1.4.4 in
            attention without a context.

    Example:
        >>> Attention(8, 6, 2, 4)(torch.randn(1, 3, 8), torch.randn(1, 5, 6)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self, dim: int, context_dim: int | None, heads: int, dim_head: int, cosine_sim: bool = False,
        scaled_twice: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.shared, self.cosine_sim = heads, context_dim is None, cosine_sim
        self.scale = COSINE_SCALE if cosine_sim else dim_head ** (-1.0 if scaled_twice else -0.5)
        inner = dim_head if self.shared else heads * dim_head
        self.norm = GainNorm(dim)
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim if self.shared else context_dim, 2 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim, bias=False), GainNorm(dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # [B, T, dim], [B, S, context_dim]
        x = self.norm(x)
        parts = (self.to_q(x), *self.to_kv(x if context is None else context).chunk(2, dim=-1))
        q, k, v = (part.unflatten(2, (-1, self.null_kv.shape[1])).transpose(1, 2) for part in parts)
        k, v = (part.expand(-1, self.heads, -1, -1) for part in (k, v))
        null_k, null_v = (part.expand(len(x), self.heads, 1, -1) for part in self.null_kv)
        if self.cosine_sim:
            q, k, null_k = (F.normalize(part, dim=-1) for part in (q, k, null_k))
        out = functional.cross_attention(q, k, v, None, null_k, null_v, softmax_scale=self.scale)
        return self.to_out(out.transpose(1, 2).flatten(2))


class OfPixels(nn.Module):
    """x + fn(tokens of x) for an image x; the names are `fn.fn.`.

    Example:
        >>> OfPixels(nn.Identity())(torch.ones(1, 2, 2, 2)).max()
        tensor(2.)
    """

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = nn.Module()
        self.fn.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.fn.fn(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class LinearAttention(nn.Module):
    """x + attention whose cost is linear in the number of pixels.

    Args:
        dim: channels of the image.
        heads: the number of heads.
        dim_head: width of a head.
        unit_values: whether values are normalised, and the sum is divided by the number of pixels (from
            version 1.4.0).

    Source: Shen et al., "Efficient Attention", 1812.01243.

    Example:
        >>> LinearAttention(4, 2, 3, True)(torch.randn(1, 4, 2, 2)).shape
        torch.Size([1, 4, 2, 2])
    """

    def __init__(self, dim: int, heads: int, dim_head: int, unit_values: bool):
        super().__init__()
        self.heads, self.dim_head, self.unit_values = heads, dim_head, unit_values
        inside = nn.Module()
        inside.norm = PixelNorm(dim)
        inside.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        inside.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, dim, 1, bias=False), PixelNorm(dim))
        self.fn = inside

    def forward(self, x: Tensor) -> Tensor:
        inside = self.fn
        qkv = inside.to_qkv(inside.norm(x)).flatten(2)
        q, k, v = qkv.unflatten(1, (3, self.heads, self.dim_head)).unbind(1)
        q, k = q.softmax(dim=2) * self.dim_head**-0.5, k.softmax(dim=3)  # [B, H, D, pixels]
        if self.unit_values:
            v = F.normalize(v, dim=2) / q.shape[3]
        out = (v @ k.transpose(2, 3)) @ q
        return x + inside.to_out(F.gelu(out.flatten(1, 2).unflatten(2, x.shape[2:])))


class ConvNorm(nn.Module):
    """silu(FiLM(norm(conv(x)))).

    Example:
        >>> ConvNorm(4, 8, groups=2)(torch.randn(1, 4, 2, 2)).shape
        torch.Size([1, 8, 2, 2])
    """

    def __init__(self, dim: int, dim_out: int, groups: int):
        super().__init__()
        self.project = Conv3x3(dim, dim_out)
        self.norm = GroupNormSiLU(groups, dim_out)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return self.norm(self.project(x), scale=scale, shift=shift)


class ResBlock(nn.Module):
    """Two `ConvNorm`s, an embedding as FiLM of the first, and attention to a context between them.

    Args:
        dim: channels of the input.
        dim_out: channels of the output.
        time_dim: width of the embedding.
        cond_dim: width of the context; None for no attention.
        groups: of the group norms.
        cosine_sim: see `Attention`.

    Example:
        >>> block = ResBlock(4, 8, time_dim=6, cond_dim=None, groups=2)
        >>> block(torch.randn(1, 4, 2, 2), torch.randn(1, 6), None).shape
        torch.Size([1, 8, 2, 2])
    """

    def __init__(
        self, dim: int, dim_out: int, *, time_dim: int, cond_dim: int | None, groups: int,
        cosine_sim: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.time_mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim_out))
        self.cross_attn = None
        if cond_dim is not None:
            self.cross_attn = Attention(dim_out, cond_dim, CROSS_HEADS, CROSS_DIM_HEAD, cosine_sim)
        self.block1, self.block2 = ConvNorm(dim, dim_out, groups), ConvNorm(dim_out, dim_out, groups)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        h = self.block1(x, *self.time_mlp(time).chunk(2, dim=1))
        if self.cross_attn is not None:
            tokens = h.flatten(2).transpose(1, 2)
            h = h + self.cross_attn(tokens, context).transpose(1, 2).unflatten(2, h.shape[2:])
        return self.block2(h) + self.res_conv(x)


class ManyKernels(nn.Module):
    """Convolutions with several kernels next to each other; the smaller the kernel, the more channels.

    Example:
        >>> ManyKernels(3, 8, (3, 7), stride=1)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 8, 8])
    """

    def __init__(self, dim: int, dim_out: int, kernels: Sequence[int], stride: int):
        super().__init__()
        kernels = sorted(kernels)
        widths = [dim_out // 2 ** (index + 1) for index in range(len(kernels) - 1)]
        widths.append(dim_out - sum(widths))
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, width, kernel, stride=stride, padding=(kernel - stride) // 2)
            for kernel, width in zip(kernels, widths, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], dim=1)


class Shuffled(nn.Module):
    """Doubles the resolution by a pixel shuffle.

    Example:
        >>> Shuffled(4, 6)(torch.randn(1, 4, 2, 2)).shape
        torch.Size([1, 6, 4, 4])
    """

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(dim, 4 * dim_out, 1), nn.SiLU(), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def downsample(kind: str, dim: int, dim_out: int) -> nn.Module:
    """The layer that halves the resolution: "unshuffle", "conv" or "kernels" (2 and 4); "none" keeps it.

    Example:
        >>> downsample("unshuffle", 4, 6)(torch.randn(1, 4, 4, 4)).shape
        torch.Size([1, 6, 2, 2])
    """
    if kind == "unshuffle":
        return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * dim, dim_out, 1))
    if kind == "conv":
        return nn.Conv2d(dim, dim_out, 4, 2, 1)
    return ManyKernels(dim, dim_out, (2, 4), stride=2) if kind == "kernels" else nn.Conv2d(dim, dim_out, 1)


def upsample(kind: str, dim: int, dim_out: int) -> nn.Module:
    """The layer that doubles the resolution: "shuffle", "nearest" or "transposed"; "none" is the identity.

    Example:
        >>> upsample("nearest", 4, 6)(torch.randn(1, 4, 2, 2)).shape
        torch.Size([1, 6, 4, 4])
    """
    if kind == "shuffle":
        return Shuffled(dim, dim_out)
    if kind == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim_out, 3, padding=1))
    return nn.ConvTranspose2d(dim, dim_out, 4, 2, 1) if kind == "transposed" else nn.Identity()
