"""Pre-norm Transformer towers: x = x + attention(norm(x)); x = x + mlp(norm(x)).

The blocks carry the weight names of OpenAI's CLIP and of open_clip (`attn.in_proj_weight`, `mlp.c_fc`, ...),
so that a state_dict of theirs loads without renaming. Sources: CLIP, arXiv 2103.00020, section 2.4; GPT-2 for
the initialisation.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the GELU approximation that OpenAI's CLIP weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention; q, k, v are one fused projection (rows of in_proj_weight in this order)."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        inner = heads * dim_head
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * inner))
        self.out_proj = nn.Linear(inner, dim)

    def forward(
        self,
        x: Tensor,  # [B, L, dim]
        causal: bool = False,
        past: tuple[Tensor, Tensor] | None = None,  # keys, values of earlier positions, each [B, H, P, D]
        mask: Tensor | None = None,  # bool, broadcasts to [B, H, L, P + L]; True = attend
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, self.heads, self.dim_head).permute(2, 0, 3, 1, 4).unbind(0)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    """One pre-norm residual block of attention and a two-layer MLP."""

    def __init__(self, dim: int, heads: int, dim_head: int, mlp_ratio: float = 4.0, quick_gelu: bool = False):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, dim_head)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(dim, hidden),
            gelu=QuickGELU() if quick_gelu else nn.GELU(),
            c_proj=nn.Linear(hidden, dim),
        ))

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        past: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, keys_values = self.attn(self.ln_1(x), causal, past, mask)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), keys_values


class Transformer(nn.Module):
    """`depth` blocks: [B, L, dim] -> [B, L, dim].

    A causal position never sees later ones, so the keys and values of a prefix can be computed once, by
    `prefill`, and serve every continuation, by `extend`: the prior's text is the same in all sampling steps.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int | None = None,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
    ):
        super().__init__()
        if depth < 1 or heads < 1:
            raise ValueError(f"depth and heads: expected at least 1, got depth={depth}, heads={heads}")
        if dim_head is None:
            if dim % heads:
                raise ValueError(f"dim: expected a multiple of heads = {heads}, got {dim}")
            dim_head = dim // heads
        blocks = (Block(dim, heads, dim_head, mlp_ratio, quick_gelu) for _ in range(depth))
        self.resblocks = nn.ModuleList(blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's initialisation: branch outputs shrink with depth, so the residual stream keeps its scale."""
        depth = len(self.resblocks)
        for block in self.resblocks:
            dim = block.ln_1.normalized_shape[0]
            nn.init.normal_(block.attn.in_proj_weight, std=dim**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=dim**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=dim**-0.5 * (2 * depth) ** -0.5)
            nn.init.zeros_(block.attn.in_proj_bias)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        for block in self.resblocks:
            x, _ = block(x, causal)
        return x

    def prefill(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every block after a causal pass over the prefix x [B, P, dim]."""
        cache = []
        for block in self.resblocks:
            x, keys_values = block(x, causal=True)
            cache.append(keys_values)
        return cache

    def extend(self, x: Tensor, cache: list[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
        """The positions behind a prefix: x [B, L, dim], mask bool [B, 1, L, P + L], True = attend."""
        for block, past in zip(self.resblocks, cache, strict=True):
            x, _ = block(x, past=past, mask=mask)
        return x


def token_lengths(tokens: Tensor, eos_token_id: int | None = None) -> Tensor:
    """Length of each caption: 1 + position of its last non-zero token; int64 [B] from int64 [B, L].

    Counting from the end keeps a token 0 inside a caption (a real "!" in OpenAI's vocabulary). eos_token_id:
    the first of these ends a caption already, as rows may be padded with it (Hugging Face's tokenizer does).
    """
    positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    lengths = torch.where(tokens != 0, positions, 0).amax(dim=1)
    if eos_token_id is None:
        return lengths
    return torch.where(tokens == eos_token_id, positions, lengths[:, None]).amin(dim=1)


class TextTransformer(nn.Module):
    """Text encoder: tokens int64 [B, L] (0 = padding at the end) -> encodings [B, L, dim].

    Padding is never attended to, and the encodings of padded positions are zero. A causal tower gets this for
    free, since padding comes last; a bidirectional one masks the keys.

    num_tokens: vocabulary size; context_length: the largest L; dim, depth, heads: the tower's size;
    quick_gelu: the activation of OpenAI's weights; eos_token_id: where a caption ends (see token_lengths),
    None: at its last non-zero token.
    """

    def __init__(
        self,
        num_tokens: int,
        context_length: int,
        dim: int,
        depth: int,
        heads: int,
        causal: bool = True,
        *,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        eos_token_id: int | None = None,
    ):
        super().__init__()
        if eos_token_id is not None and not 0 < eos_token_id < num_tokens:
            raise ValueError(f"eos_token_id: expected an id from 1 to {num_tokens - 1}, got {eos_token_id}")
        self.config = dict(
            num_tokens=num_tokens, context_length=context_length, dim=dim, depth=depth, heads=heads,
            causal=causal, mlp_ratio=mlp_ratio, quick_gelu=quick_gelu, eos_token_id=eos_token_id,
        )
        self.num_tokens, self.context_length, self.causal = num_tokens, context_length, causal
        self.eos_token_id = eos_token_id
        self.token_embedding = nn.Embedding(num_tokens, dim)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, dim))
        self.transformer = Transformer(dim, depth, heads, mlp_ratio=mlp_ratio, quick_gelu=quick_gelu)
        self.ln_final = nn.LayerNorm(dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, L], L <= context_length -> encodings [B, L, dim], zero where padded."""
        return self.encode_tokens(tokens)[0]

    def encode_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens int64 [B, L] -> (encodings [B, L, dim], mask bool [B, L], True up to the last token)."""
        self._check_tokens(tokens)
        batch, length = tokens.shape
        lengths = token_lengths(tokens, self.eos_token_id)
        mask = torch.arange(length, device=tokens.device) < lengths[:, None]
        # On the CPU only the longest caption's columns are computed. On a GPU, asking for that length would
        # stall the queue, and shapes that change from batch to batch would defeat compiled graphs.
        used = length
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and batch > 0:
            used = max(int(lengths.max()), 1)
        x = self.token_embedding(tokens[:, :used])
        x = x + self.positional_embedding[:used].to(x.dtype)
        if self.causal:
            x = self.transformer(x, causal=True)
        else:
            # A row attends to itself even if padded, so that no softmax is empty.
            keys = mask[:, None, None, :used] | torch.eye(used, dtype=torch.bool, device=tokens.device)
            for block in self.transformer.resblocks:
                x, _ = block(x, mask=keys)
        x = self.ln_final(x)
        x = x.masked_fill(~mask[:, :used, None], 0.0)
        return F.pad(x, (0, 0, 0, length - used)), mask

    def _check_tokens(self, tokens: Tensor, name: str = "text") -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            came = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"{name}: expected token ids, an int64 tensor [B, L], got {came}")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context_length:
            raise ValueError(
                f"{name}: expected [B, L] with 1 <= L <= {self.context_length}, got {tuple(tokens.shape)}")
        # Only where looking at the values costs nothing; a GPU reports it from the embedding kernel.
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.num_tokens:
                expected = f"token ids in [0, {self.num_tokens - 1}]"
                raise ValueError(f"{name}: expected {expected}, got {low} to {high}")
