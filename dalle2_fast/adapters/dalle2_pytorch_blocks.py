"""DALLE2-pytorch's Block, Attention and CrossAttention, patched. Written for and tested with 1.15.6.

Its attention has one more key than it is given, a learned `null`, which is always seen. Here that key and the
given ones are the two parts that `cross_attention` takes, so nothing is concatenated.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from dalle2_fast import functional
from dalle2_fast.adapters._swap import Cover, Patched, overrides
from dalle2_fast.adapters.norm_blocks import norm_obstacle


class FusedBlock(Patched):
    """Convolution, then group norm, FiLM and SiLU as one op."""

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        scale, shift = (None, None) if scale_shift is None else (part.flatten(1) for part in scale_shift)
        return self.norm(self.project(x), scale, shift, "silu")


class FusedCrossAttention(Patched):
    def forward(
        self,
        x: Tensor,  # [B, T, C]
        context: Tensor,  # [B, S, E]
        mask: Tensor | None = None,  # bool [B, S], True = attend
    ) -> Tensor:  # [B, T, C]
        context = self.norm_context(context)
        q = _heads(self.to_q(self.norm(x)), self.heads)
        k, v = (_heads(part, self.heads) for part in self.to_kv(context).chunk(2, dim=-1))
        out = functional.cross_attention(q, k, v, mask, *_null(self, q), softmax_scale=self.scale)
        return self.to_out(out.transpose(1, 2).flatten(2))


class FusedSelfAttention(Patched):
    """Its `Attention`: many heads of queries, one of keys and values. Theirs runs where a bias is given, and
    where attention weights are dropped."""

    def forward(
        self,
        x: Tensor,  # [B, T, C]
        mask: Tensor | None = None,  # bool [B, T], True = attend
        attn_bias: Tensor | None = None,
    ) -> Tensor:  # [B, T, C]
        if attn_bias is not None or (self.training and self.dropout.p > 0):
            return super().forward(x, mask=mask, attn_bias=attn_bias)
        x = self.norm(x)
        q = _heads(self.to_q(x), self.heads)
        k, v = (_shared(part, self.heads) for part in self.to_kv(x).chunk(2, dim=-1))
        # q is scaled once, then q and k by the root of the scale each: as theirs, and as its weights expect.
        scale = self.scale * self.scale
        out = functional.cross_attention(q, k, v, mask, *_null(self, q), softmax_scale=scale)
        return self.to_out(out.transpose(1, 2).flatten(2))


def _heads(x: Tensor, heads: int) -> Tensor:  # [B, T, H D] -> [B, H, T, D]
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _shared(x: Tensor, heads: int) -> Tensor:  # [B, T, D] -> [B, H, T, D], all heads the same memory
    return x[:, None].expand(-1, heads, -1, -1)


def _null(attention: nn.Module, q: Tensor) -> tuple[Tensor, Tensor]:  # [B, H, 1, D] each
    k, v = attention.null_kv.unbind(dim=0)
    return k.expand(q.shape[0], q.shape[1], 1, -1), v.expand(q.shape[0], q.shape[1], 1, -1)


# ----------------------------------------------------------------------------------------------------- covers


def _theirs(name: str) -> type | None:
    found = sys.modules.get("dalle2_pytorch.dalle2_pytorch")
    return None if found is None else getattr(found, name)


def _is_a(name: str):
    def is_one(module: nn.Module) -> bool:
        kind = _theirs(name)
        return kind is not None and isinstance(module, kind)

    return is_one


def _block_obstacle(block: nn.Module) -> str | None:
    if not isinstance(block.act, nn.SiLU):
        return f"its activation is {type(block.act).__name__}, not SiLU"
    return overrides(block, _theirs("Block")) or norm_obstacle(block.norm)


def _cross_obstacle(attention: nn.Module) -> str | None:
    if attention.cosine_sim:
        return "cosine_sim=True: the op takes inner products, not cosines"
    return overrides(attention, _theirs("CrossAttention"))


def _self_obstacle(attention: nn.Module) -> str | None:
    if attention.cosine_sim:
        return "cosine_sim=True: the op takes inner products, not cosines"
    if attention.causal:
        return "causal=True: the op has no causal mask"
    if attention.rotary_emb is not None:
        return "rotary_emb: queries and keys are rotated first"
    return overrides(attention, _theirs("Attention"))


COVERS = (
    Cover("norms", FusedBlock, _is_a("Block"), _block_obstacle),
    Cover("attention", FusedCrossAttention, _is_a("CrossAttention"), _cross_obstacle),
    Cover("attention", FusedSelfAttention, _is_a("Attention"), _self_obstacle),
)
