"""The network of DALLE2-pytorch's prior: a causal Transformer over a caption and a noised embedding.

    [text encodings, text embedding, time, noised image embedding, query] -> image embedding at the query.

It differs from ours in every block: queries of many heads share one key and value, a learned key is always
visible, positions are rotations and a bias, the MLP is gated, and norms follow the branches. The tensors have
DALLE2-pytorch's names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COSINE_SCALE = 16.0  # of cosines before the softmax
ROTATED = 32  # of the entries of a head, at most
BUCKETS, FARTHEST = 32, 128  # of the bias by distance (T5)


class GainNorm(nn.Module):
    """Layer norm with a gain `g` and no bias.

    Args:
        dim: the width.
        divides: whether the input is divided by its largest entry first, against overflow in half precision.

    Example:
        >>> GainNorm(2)(torch.tensor([[1.0, 3.0]])).round(decimals=2)
        tensor([[-1.,  1.]], grad_fn=<RoundBackward1>)
    """

    def __init__(self, dim: int, divides: bool = False):
        super().__init__()
        self.divides = divides
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x / x.amax(dim=-1, keepdim=True) if self.divides else x
        return F.layer_norm(x, x.shape[-1:], self.g)


class DistanceBias(nn.Module):
    """A learned bias per head for the distance of query and key, in buckets that grow with the distance.

    Args:
        heads: the number of heads.

    Source: Raffel et al., "T5", 1910.10683, section 2.1.

    Example:
        >>> DistanceBias(2)(torch.arange(3), torch.arange(4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, heads: int):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(BUCKETS, heads)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:  # positions [Q], [K] -> [heads, Q, K]
        distance = (queries[:, None] - keys).clamp(min=0)
        exact = BUCKETS // 2
        far = torch.log(distance.float() / exact) / math.log(FARTHEST / exact) * (BUCKETS - exact)
        far = (exact + far.clamp(min=0).long()).clamp(max=BUCKETS - 1)
        return self.relative_attention_bias(torch.where(distance < exact, distance, far)).permute(2, 0, 1)


def rotary_frequencies(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The frequencies that rotate `size` entries: float32 [size / 2].

    Example:
        >>> rotary_frequencies(4)
        tensor([1.0000, 0.0100])
    """
    return 10000.0 ** (-torch.arange(0, size, 2, device=device).float() / size)


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the first entries by position times frequency.

    Args:
        x: [..., T, D].
        positions: of the T tokens.
        frequencies: one per pair, [R / 2] with R <= D.

    Source: Su et al., "RoFormer", 2104.09864.

    Example:
        >>> rotated(torch.tensor([[1.0, 0.0, 5.0]]), torch.tensor([0]), torch.tensor([1.0]))
        tensor([[1., 0., 5.]])
    """
    angle = positions[:, None] * frequencies  # float32: half precision would miss a position of 80 by 0.06
    size = 2 * len(frequencies)
    even, odd = x[..., :size:2], x[..., 1:size:2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., size:]], dim=-1)


class SharedKeyAttention(nn.Module):
    """Causal attention: many heads of queries, one head of keys and values, and a learned key and value.

    Args:
        dim: width of the tokens.
        heads: the number of heads of queries.
        dim_head: width of a head.
        cosine_sim: whether logits are cosines times 16, instead of inner products over the root of dim_head.

    Source: Shazeer, "One Write-Head is All You Need", 1911.02150.

    Example:
        >>> attention, bias = SharedKeyAttention(8, 2, 4, True), torch.zeros(2, 3, 4)
        >>> attention(torch.randn(1, 3, 8), torch.arange(3), bias, None, None)[0].shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, dim: int, heads: int, dim_head: int, cosine_sim: bool):
        super().__init__()
        self.heads, self.cosine_sim = heads, cosine_sim
        self.norm = GainNorm(dim)
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim, bias=False), GainNorm(dim))

    def forward(
        self,
        x: Tensor,  # [B, T, dim]
        positions: Tensor,  # [T]
        bias: Tensor,  # [heads, T, 1 + P + T], -inf where a key is not visible; may have a batch in front
        frequencies: Tensor | None,
        past: tuple[Tensor, Tensor] | None,  # keys, values [B, P, dim_head] of earlier positions
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, T, dim], and the keys and values of all P + T positions."""
        x = self.norm(x)
        q = self.to_q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        if frequencies is not None:
            q, k = rotated(q, positions, frequencies), rotated(k, positions, frequencies)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        null_k, null_v = (null.expand(len(x), 1, -1) for null in self.null_kv)
        keys, values = torch.cat([null_k, k], dim=1), torch.cat([null_v, v], dim=1)
        if self.cosine_sim:
            q, keys = F.normalize(q, dim=-1), F.normalize(keys, dim=-1)
        scale = COSINE_SCALE if self.cosine_sim else q.shape[-1] ** -0.5
        out = F.scaled_dot_product_attention(
            q, *(part[:, None].expand(-1, self.heads, -1, -1) for part in (keys, values)),
            attn_mask=bias.to(q.dtype), scale=scale,
        )  # fmt: skip
        return self.to_out(out.transpose(1, 2).flatten(2)), (k, v)


class Gated(nn.Module):
    """a * silu(b) of an input [..., 2 D] = [a, b].

    Example:
        >>> Gated()(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return x * F.silu(gate)


def _feed_forward(dim: int, inner: int, normformer: bool) -> nn.Sequential:
    return nn.Sequential(
        GainNorm(dim), nn.Linear(dim, 2 * inner, bias=False), Gated(),
        GainNorm(inner) if normformer else nn.Identity(), nn.Identity(),  # the second one was dropout
        nn.Linear(inner, dim, bias=False),
    )  # fmt: skip


class CausalTransformer(nn.Module):
    """The blocks: x = attention(x) + x; x = mlp(x) + x; then a norm and a projection.

    Args:
        options: those of `PriorNetwork`, which describes them.

    Example:
        >>> options = dict(dim=8, depth=1, heads=2, dim_head=4, ff_inner=16)
        >>> transformer = CausalTransformer(**options)
        >>> transformer(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))[0].shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self, *, dim: int, depth: int, heads: int, dim_head: int, ff_inner: int, cosine_sim: bool = True,
        divides: bool = True, bias_scale: float = 1.0, norm_in: bool = False, norm_out: bool = True,
        final_proj: bool = True, normformer: bool = False, rotary_emb: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.init_norm = GainNorm(dim) if norm_in else nn.Identity()
        self.rel_pos_bias, self.bias_scale = DistanceBias(heads), bias_scale
        self.rotated_dim = min(ROTATED, dim_head) if rotary_emb else 0
        self.layers = nn.ModuleList(
            nn.ModuleList([
                SharedKeyAttention(dim, heads, dim_head, cosine_sim),
                _feed_forward(dim, ff_inner, normformer),
            ])
            for _ in range(depth)
        )  # fmt: skip
        self.norm = GainNorm(dim, divides) if norm_out else nn.Identity()
        self.project_out = nn.Linear(dim, dim, bias=False) if final_proj else nn.Identity()

    def forward(
        self,
        x: Tensor,  # [B, T, dim]
        visible: Tensor,  # bool [B, P + T]: which keys may be seen
        past: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The output of the T tokens, and keys and values of all P + T positions of each layer."""
        before = 0 if past is None else past[0][0].shape[1]
        positions = torch.arange(before, before + x.shape[1], device=x.device)
        keys = torch.arange(1 + before + x.shape[1], device=x.device)  # the learned key is the first
        bias = self.rel_pos_bias(positions, keys) * self.bias_scale
        seen = (keys <= positions[:, None] + 1) & F.pad(visible, (1, 0), value=True)[:, None, None, :]
        bias = torch.where(seen, bias, -torch.inf)
        x, cache, frequencies = self.init_norm(x), [], None
        if self.rotated_dim:
            frequencies = rotary_frequencies(self.rotated_dim, x.device)
        for index, (attention, feed_forward) in enumerate(self.layers):
            earlier = None if past is None else past[index]
            attended, keys_values = attention(x, positions, bias, frequencies, earlier)
            x = attended + x
            x = feed_forward(x) + x
            cache.append(keys_values)
        return self.project_out(self.norm(x)), cache


class PriorNetwork(nn.Module):
    """DALLE2-pytorch's DiffusionPriorNetwork.

    Args:
        dim: width of the tokens, which is that of CLIP's embeddings and text encodings.
        depth: the number of blocks.
        heads: the number of heads of queries.
        dim_head: width of a head.
        ff_inner: hidden width of the MLPs.
        num_timesteps: the number of discrete times, each with a learned embedding.
        num_time_embeds: tokens per time.
        num_image_embeds: tokens per image embedding.
        num_text_embeds: tokens per text embedding.
        max_text_len: positions of the caption; a shorter caption is filled up. None with padding="masked".
        padding: what a position without a token, and a dropped caption, become. "masked" (versions up to
            0.15): keys that nobody sees. "text" (0.23 to 1.10): a learned token, and captions are never
            dropped. "all" (from 1.11): a learned token, and dropped embeddings are learned, too.
        cosine_sim: whether attention takes cosines (from 1.4.4).
        divides: whether the last norm divides by the largest entry first, see `GainNorm`.
        bias_scale: factor on the bias by distance, 128 from version 0.23 to 1.4.3.
        norm_in: whether a norm comes before the blocks.
        norm_out: whether a norm comes after the blocks.
        final_proj: whether a projection comes at the end.
        normformer: whether a norm follows the gate of the MLPs.
        rotary_emb: whether queries and keys are rotated.

    Example:
        >>> net = PriorNetwork(dim=8, depth=1, heads=2, dim_head=4, ff_inner=16, max_text_len=5)
        >>> prefix = net.encode_prefix(torch.randn(2, 8), torch.randn(2, 3, 8), None, None)
        >>> net.denoise(torch.randn(2, 8), torch.tensor([0, 9]), prefix).shape
        torch.Size([2, 8])
    """

    def __init__(
        self, *, dim: int, depth: int, heads: int, dim_head: int, ff_inner: int, num_timesteps: int = 1000,
        num_time_embeds: int = 1, num_image_embeds: int = 1, num_text_embeds: int = 1,
        max_text_len: int | None = 256, padding: str = "all", **options: Any,
    ):  # fmt: skip
        super().__init__()
        self.config = dict(
            dim=dim, depth=depth, heads=heads, dim_head=dim_head, ff_inner=ff_inner,
            num_timesteps=num_timesteps, num_time_embeds=num_time_embeds, num_image_embeds=num_image_embeds,
            num_text_embeds=num_text_embeds, max_text_len=max_text_len, padding=padding, **options,
        )  # fmt: skip
        self.dim, self.text_dim, self.padding, self.context_length = dim, dim, padding, max_text_len

        def several(count: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(dim, count * dim) if count > 1 else nn.Identity())

        self.to_text_embeds, self.to_image_embeds = several(num_text_embeds), several(num_image_embeds)
        self.to_time_embeds = nn.Sequential(nn.Embedding(num_timesteps, num_time_embeds * dim))
        self.learned_query = nn.Parameter(torch.randn(dim))
        self.causal_transformer = CausalTransformer(
            dim=dim, depth=depth, heads=heads, dim_head=dim_head, ff_inner=ff_inner, **options
        )
        if padding == "text":
            self.null_text_embed = nn.Parameter(torch.randn(1, max_text_len, dim))
        elif padding == "all":
            self.null_text_encodings = nn.Parameter(torch.randn(1, max_text_len, dim))
            self.null_text_embeds = nn.Parameter(torch.randn(1, num_text_embeds, dim))
            self.null_image_embed = nn.Parameter(torch.randn(1, dim))

    def forward(
        self,
        image_embed: Tensor,  # [B, dim]
        time: Tensor,  # int64 [B]
        text_embed: Tensor,  # [B, dim]
        text_encodings: Tensor | None = None,  # [B, L, dim]
        text_mask: Tensor | None = None,  # bool [B, L]
        keep: Tensor | None = None,  # bool [B]
    ) -> Tensor:  # [B, dim]
        """Predict from a noised image embedding; rows of which keep is False have no caption."""
        prefix = self.encode_prefix(text_embed, text_encodings, text_mask, keep)
        return self.denoise(image_embed, time, prefix)

    def encode_prefix(
        self, text_embed: Tensor, text_encodings: Tensor | None, text_mask: Tensor | None, keep: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        """The caption's part of the sequence, the same in all sampling steps: keys and values of each layer,
        which positions are visible, and `keep`."""
        batch, device, dtype = len(text_embed), text_embed.device, self.learned_query.dtype
        keep = torch.ones(batch, dtype=torch.bool, device=device) if keep is None else keep
        if text_encodings is None:
            text_encodings = text_embed.new_zeros(batch, 0, self.dim)
        if text_mask is None:
            text_mask = (text_encodings != 0).any(dim=-1)
        encodings, rows = text_encodings.to(dtype), keep[:, None, None]
        embeds = self.to_text_embeds(text_embed.to(dtype)).unflatten(1, (-1, self.dim))
        visible = torch.ones(batch, embeds.shape[1], dtype=torch.bool, device=device) & keep[:, None]
        if self.padding == "masked":
            visible = torch.cat([text_mask & keep[:, None], visible], dim=1)
        else:
            length = self.context_length
            encodings, text_mask = encodings[:, :length], text_mask[:, :length]
            missing = length - encodings.shape[1]
            encodings = F.pad(encodings, (0, 0, 0, missing))
            text_mask = F.pad(text_mask, (0, missing))[..., None]
            if self.padding == "text":
                encodings = torch.where(text_mask, encodings, self.null_text_embed)
            else:
                encodings = torch.where(text_mask & rows, encodings, self.null_text_encodings)
                embeds = torch.where(rows, embeds, self.null_text_embeds)
            visible = torch.ones(batch, length + embeds.shape[1], dtype=torch.bool, device=device)
        _, cache = self.causal_transformer(torch.cat([encodings, embeds], dim=1), visible)
        return cache, visible, keep

    def denoise(
        self, image_embed: Tensor, time: Tensor, prefix: tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]
    ) -> Tensor:
        """Predict [B, dim] from a noised image embedding [B, dim] at times [B], after a prefix."""
        cache, visible, keep = prefix
        dtype = self.learned_query.dtype
        times = self.to_time_embeds(time.long()).unflatten(1, (-1, self.dim))
        images = self.to_image_embeds(image_embed.to(dtype)).unflatten(1, (-1, self.dim))
        if self.padding == "all":
            images = torch.where(keep[:, None, None], images, self.null_image_embed)
        query = self.learned_query.expand(len(images), 1, -1)
        tail = torch.cat([times, images, query], dim=1)
        visible = F.pad(visible, (0, tail.shape[1]), value=True)
        return self.causal_transformer(tail, visible, cache)[0][:, -1]
