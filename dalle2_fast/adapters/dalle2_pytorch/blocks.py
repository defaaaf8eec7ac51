"""The rules of `patch` for DALLE2-pytorch's Block, Attention and CrossAttention.

Its attention has an additional, learned key, `null`, which is always visible. That key and those of the input
are the two parts of keys that `cross_attention` takes, so nothing is concatenated. Written for and tested
with 1.15.6. The package is not imported: a user who has one of its modules has imported it.
"""

from __future__ import annotations

from torch import Tensor, nn

from dalle2_fast import functional
from dalle2_fast.adapters._foreign import imported_class, is_instance
from dalle2_fast.adapters._swap import Patched, PatchRule, why_overridden
from dalle2_fast.adapters.norm_blocks import why_norm_unavailable

_MODULE = "dalle2_pytorch.dalle2_pytorch"
_COSINES = "cosine_sim=True: the op takes inner products, not cosines"


class FusedBlock(Patched):
    """Convolution, then group norm, FiLM and SiLU as one op."""

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        scale, shift = (None, None) if scale_shift is None else (part.flatten(1) for part in scale_shift)
        return self.norm(self.project(x), scale, shift, "silu")


class FusedCrossAttention(Patched):
    """Cross-attention with the null key, as one op."""

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
    """DALLE2-pytorch's `Attention`: many heads of queries, one head of keys and values. The original runs
    with a bias, and where attention weights are dropped."""

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
        # DALLE2-pytorch, and so its weights, scale q once, and then q and k by the root of the scale each.
        scale = self.scale * self.scale
        out = functional.cross_attention(q, k, v, mask, *_null(self, q), softmax_scale=scale)
        return self.to_out(out.transpose(1, 2).flatten(2))


def _heads(x: Tensor, heads: int) -> Tensor:  # [B, T, H D] -> [B, H, T, D]
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _shared(x: Tensor, heads: int) -> Tensor:  # [B, T, D] -> [B, H, T, D] without a copy
    return x[:, None].expand(-1, heads, -1, -1)


def _null(attention: nn.Module, q: Tensor) -> tuple[Tensor, Tensor]:  # [B, H, 1, D] each
    k, v = attention.null_kv.unbind(dim=0)
    return k.expand(q.shape[0], q.shape[1], 1, -1), v.expand(q.shape[0], q.shape[1], 1, -1)


# ------------------------------------------------------------------------------------------------------ rules

def _why_block_unavailable(block: nn.Module) -> str | None:
    if not isinstance(block.act, nn.SiLU):
        return f"its activation is {type(block.act).__name__}, not SiLU"
    return why_overridden(block, imported_class(_MODULE, "Block")) or why_norm_unavailable(block.norm)


def _why_cross_unavailable(attention: nn.Module) -> str | None:
    if attention.cosine_sim:
        return _COSINES
    return why_overridden(attention, imported_class(_MODULE, "CrossAttention"))


def _why_self_unavailable(attention: nn.Module) -> str | None:
    if attention.cosine_sim:
        return _COSINES
    if attention.causal:
        return "causal=True: the op has no causal mask"
    if attention.rotary_emb is not None:
        return "rotary_emb: queries and keys are rotated first"
    return why_overridden(attention, imported_class(_MODULE, "Attention"))


RULES = (
    PatchRule("norms", FusedBlock, is_instance(_MODULE, "Block"), _why_block_unavailable),
    PatchRule(
        "attention", FusedCrossAttention, is_instance(_MODULE, "CrossAttention"), _why_cross_unavailable
    ),
    PatchRule("attention", FusedSelfAttention, is_instance(_MODULE, "Attention"), _why_self_unavailable),
)
