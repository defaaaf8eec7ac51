"""The U-Net of DALLE2-pytorch's decoder: eps(x_t, t, image embedding, caption, small image).

It differs from ours in every block: norms follow the convolutions, cross-attention is inside of the residual
blocks, every block has a skip connection. The tensors have DALLE2-pytorch's names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.adapters.published.unet_layers import (
    Attention,
    LinearAttention,
    ManyKernels,
    OfPixels,
    ResBlock,
    downsample,
    upsample,
)


def sines_first(time: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[sin(time f), cos(time f)] with frequencies f from 1 to exactly 1/10000: [B, width].

    Example:
        >>> sines_first(torch.tensor([0]), 4, torch.float32)
        tensor([[0., 0., 1., 1.]])
    """
    half = width // 2
    exponent = torch.arange(half, device=time.device, dtype=torch.float32) / (half - 1)
    angle = time.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)


class Dalle2PytorchUnet(nn.Module):
    """DALLE2-pytorch's Unet.

    Args:
        dim: width of the sines of the time, and of the last block.
        widths: channels after the first convolution, and of each level.
        blocks: residual blocks of each level, beside the first one.
        attention: of each level, "self", "linear" or None.
        groups: of the group norms of each level.
        in_channels: channels of the input, with a small image that is enlarged and concatenated.
        channels_out: channels of the output.
        cond_dim: width of the context.
        num_time_tokens: context tokens made of the time.
        num_image_tokens: context tokens made of the image embedding.
        image_embed_dim: width of the image embedding; None for none.
        image_in_time: whether the image embedding is added to the time, too.
        text_embed_dim: width of the text encodings; None for none.
        max_text_len: positions of the caption.
        heads: of self-attention and linear attention.
        dim_head: width of these heads.
        first_kernels: sizes of the kernels of the first convolution.
        last_kernel: size of the kernel of the last one.
        memory_efficient: whether a level begins with the change of resolution, instead of ending with it.
        down: see `downsample`.
        up: see `upsample`.
        low_res_last: whether the small image is also an input of the last convolution.
        cosine_sim_cross_attn: see `Attention`.
        cosine_sim_self_attn: see `Attention`.
        scaled_twice: see `Attention`.
        unit_values: see `LinearAttention`.
        skip_scale: factor on the skip connections.

    Example:
        >>> net = Dalle2PytorchUnet(dim=8, widths=(8, 8, 16), blocks=(1, 1), attention=(None, "self"),
        ...                         groups=(4, 4), cond_dim=6, image_embed_dim=5, heads=2, dim_head=4)
        >>> net(torch.randn(2, 3, 8, 8), torch.tensor([0, 9]), torch.randn(2, 5)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self, *, dim: int, widths: list[int], blocks: list[int], attention: list[str | None],
        groups: list[int], in_channels: int = 3, channels_out: int = 3, cond_dim: int,
        num_time_tokens: int = 2, num_image_tokens: int = 4, image_embed_dim: int | None = None,
        image_in_time: bool = True, text_embed_dim: int | None = None, max_text_len: int = 256,
        heads: int = 16, dim_head: int = 32, first_kernels: list[int] = (3, 7, 15), last_kernel: int = 1,
        memory_efficient: bool = False, down: str = "unshuffle", up: str = "shuffle",
        low_res_last: bool = False, cosine_sim_cross_attn: bool = False, cosine_sim_self_attn: bool = False,
        scaled_twice: bool = True, unit_values: bool = True, skip_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.config = {
            name: list(value) if isinstance(value, (list, tuple)) else value
            for name, value in locals().items() if name not in ("self", "__class__")
        }  # fmt: skip
        self.dim, self.cond_dim, self.skip_scale = dim, cond_dim, skip_scale
        self.image_embed_dim, self.text_embed_dim = image_embed_dim, text_embed_dim
        self.max_text_len, self.low_res_last = max_text_len, low_res_last
        time_dim, levels = 4 * dim, len(widths) - 1

        def res(before: int, after: int, level: int, cond: bool) -> ResBlock:
            return ResBlock(
                before, after, time_dim=time_dim, cond_dim=cond_dim if cond else None, groups=groups[level],
                cosine_sim=cosine_sim_cross_attn,
            )  # fmt: skip

        def attend(kind: str | None, width: int) -> nn.Module:
            if kind == "linear":
                return LinearAttention(width, heads, dim_head, unit_values)
            inside = Attention(width, None, heads, dim_head, cosine_sim_self_attn, scaled_twice)
            return nn.Identity() if kind is None else OfPixels(inside)

        first = widths[0]
        self.init_conv = (
            ManyKernels(in_channels, first, first_kernels, stride=1) if len(first_kernels) > 1
            else nn.Conv2d(in_channels, first, first_kernels[0], padding=first_kernels[0] // 2)
        )  # fmt: skip
        self.to_time_hiddens = nn.Sequential(nn.Identity(), nn.Linear(dim, time_dim), nn.GELU())
        self.to_time_tokens = nn.Sequential(nn.Linear(time_dim, cond_dim * num_time_tokens))
        self.to_time_cond = nn.Sequential(nn.Linear(time_dim, time_dim))
        if image_embed_dim is not None:
            self.image_to_tokens = nn.Sequential(nn.Linear(image_embed_dim, cond_dim * num_image_tokens))
        self.to_image_hiddens = None
        if image_in_time and image_embed_dim is not None:
            self.to_image_hiddens = nn.Sequential(nn.Linear(image_embed_dim, time_dim), nn.GELU())
        self.norm_cond, self.norm_mid_cond = nn.LayerNorm(cond_dim), nn.LayerNorm(cond_dim)
        self.text_to_cond = None if text_embed_dim is None else nn.Linear(text_embed_dim, cond_dim)
        self.null_image_embed = nn.Parameter(torch.randn(1, num_image_tokens, cond_dim))
        self.null_image_hiddens = nn.Parameter(torch.randn(1, time_dim))
        self.null_text_embed = nn.Parameter(torch.randn(1, max_text_len, cond_dim))
        self.init_resnet_block = res(first, first, 0, False) if memory_efficient else None

        self.downs, self.ups, skips = nn.ModuleList(), nn.ModuleList(), []
        for level, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            width = after if memory_efficient else before
            skips.append(width)
            last = level == levels - 1
            self.downs.append(nn.ModuleList([
                downsample(down, before, after) if memory_efficient else nn.Identity(),
                res(width, width, level, False),
                nn.ModuleList(res(width, width, level, level > 0) for _ in range(blocks[level])),
                attend(attention[level], width),
                downsample("none" if last or memory_efficient else down, width, after),
            ]))  # fmt: skip
        width = widths[-1]
        self.mid_block1, self.mid_block2 = res(width, width, -1, True), res(width, width, -1, True)
        self.mid_attn = attend("self", width)
        for level in reversed(range(levels)):
            before, after, skip = widths[level], widths[level + 1], skips[level]
            keeps = level == 0 and not memory_efficient
            self.ups.append(nn.ModuleList([
                res(after + skip, after, level, level > 0),
                nn.ModuleList(res(after + skip, after, level, level > 0) for _ in range(blocks[level])),
                attend(attention[level], after),
                upsample("none" if keeps else up, after, before),
            ]))  # fmt: skip
        self.final_resnet_block = res((widths[0] if memory_efficient else widths[1]) + first, dim, 0, False)
        width = dim + (in_channels // 2 if low_res_last else 0)
        self.to_out = nn.Conv2d(width, channels_out, last_kernel, padding=last_kernel // 2)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        time: Tensor,  # [B]
        image_embed: Tensor | None = None,  # [B, image_embed_dim]
        text_encodings: Tensor | None = None,  # [B, L, text_embed_dim]
        text_mask: Tensor | None = None,  # bool [B, L]
        low_res: Tensor | None = None,  # [B, C, H, W] in [-1, 1]
        keep: Tensor | None = None,  # bool [B]
    ) -> Tensor:  # [B, channels_out, H, W]
        """Predict from a noisy image.

        Args:
            x: noisy images.
            time: times.
            image_embed: image embeddings, for a network that takes them.
            text_encodings: encodings of captions, for a network that takes them.
            text_mask: which of their positions are tokens; None: those that are not all zero.
            low_res: small images, enlarged, for a network that takes them.
            keep: where it is False, the image embedding and the caption are dropped.
        """
        keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if keep is None else keep
        x = x if low_res is None else torch.cat([x, low_res], dim=1)
        x = first = self.init_conv(x)
        hiddens = self.to_time_hiddens(sines_first(time, self.dim, x.dtype))
        embed = self.to_time_cond(hiddens)
        if self.to_image_hiddens is not None:
            embed = embed + torch.where(
                keep[:, None], self.to_image_hiddens(image_embed), self.null_image_hiddens
            )
        context, middle = self._context(hiddens, image_embed, text_encodings, text_mask, keep)
        if self.init_resnet_block is not None:
            x = self.init_resnet_block(x, embed, None)
        skips = []
        for before, init, blocks, attention, after in self.downs:
            x = init(before(x), embed, context)
            for block in blocks:
                x = block(x, embed, context)
                skips.append(x)
            x = attention(x)
            skips.append(x)
            x = after(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, embed, middle)), embed, middle)
        for init, blocks, attention, after in self.ups:
            for block in (init, *blocks):
                x = block(torch.cat([x, skips.pop() * self.skip_scale], dim=1), embed, context)
            x = after(attention(x))
        x = self.final_resnet_block(torch.cat([x, first], dim=1), embed, None)
        return self.to_out(torch.cat([x, low_res], dim=1) if self.low_res_last else x)

    def _context(
        self, hiddens: Tensor, image_embed: Tensor | None, encodings: Tensor | None, mask: Tensor | None,
        keep: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The context of all blocks [B, S, cond_dim], and that of the middle, which also has the caption."""
        tokens = [self.to_time_tokens(hiddens).unflatten(1, (-1, self.cond_dim))]
        if self.image_embed_dim is not None:
            image = self.image_to_tokens(image_embed).unflatten(1, (-1, self.cond_dim))
            tokens.append(torch.where(keep[:, None, None], image, self.null_image_embed))
        context = torch.cat(tokens, dim=1)
        if self.text_embed_dim is not None and encodings is not None:
            mask = (encodings != 0).any(dim=-1) if mask is None else mask
            text, mask = self.text_to_cond(encodings)[:, : self.max_text_len], mask[:, : self.max_text_len]
            missing = self.max_text_len - text.shape[1]
            mask = F.pad(mask & keep[:, None], (0, missing))[..., None]
            text = torch.where(mask, F.pad(text, (0, 0, 0, missing)), self.null_text_embed)
            tokens.append(text)
        return self.norm_cond(context), self.norm_mid_cond(torch.cat(tokens, dim=1))
