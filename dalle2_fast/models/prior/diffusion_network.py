"""The network of the diffusion prior: a causal Transformer that reads a caption and a noised image embedding.

    [text encodings, text embedding, time, noised image embedding, query] -> image embedding at the query.

Source: unCLIP, arXiv 2204.06125, section 2.2; the defaults are the public Karlo prior's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.models.transformer import Transformer
from dalle2_fast.models.unet.blocks import sinusoidal_embedding

TAIL = 3  # positions behind the caption: time, noised embedding, query


@dataclass
class Prefix:
    """What the network remembers of a caption between sampling steps."""

    keys_values: list[tuple[Tensor, Tensor]]  # of each block, [B, H, P, D]
    valid: Tensor  # bool [B, P]

    def repeat_interleave(self, count: int) -> Prefix:
        """Each caption `count` times, side by side."""
        keys_values = [tuple(x.repeat_interleave(count, 0) for x in pair) for pair in self.keys_values]
        return Prefix(keys_values, self.valid.repeat_interleave(count, 0))


class CaptionPrefix(nn.Module):
    """A causal Transformer whose sequence begins with [text encodings, text embedding].

    Subclasses own text_embed_proj, text_encodings_proj, positional_embedding (its first context_length + 1
    rows are the caption's) and transformer.
    """

    def remember(
        self,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Prefix:
        """Compute the caption's part once, for all that follows it."""
        tokens, valid = self._embed_text(proj_embedding, encoder_hidden_states, attention_mask)
        tokens, lengths = pack(tokens, valid)
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return Prefix(self.transformer.prefill(tokens), valid)

    def _embed_text(
        self, text_embed: Tensor, text_encodings: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """-> (tokens [B, L + 1, dim], valid bool [B, L + 1])."""
        batch = len(text_embed)
        embed = self.text_embed_proj(text_embed)[:, None]
        embed = embed + self.positional_embedding[self.context_length].to(embed.dtype)
        if text_encodings is None:
            return embed, torch.ones(batch, 1, dtype=torch.bool, device=embed.device)
        length = text_encodings.shape[1]
        x = self.text_encodings_proj(text_encodings)
        x = x + self.positional_embedding[:length].to(x.dtype)
        if text_mask is None:
            text_mask = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        return torch.cat([x, embed], dim=1), F.pad(text_mask, (0, 1), value=True)


class DiffusionPriorNetwork(CaptionPrefix):
    """Causal Transformer over [text encodings, text embedding, time, noised image embedding, query].

    The defaults are Karlo's (20 layers of 32 heads x 64).

    dim: width; depth, heads, dim_head (None = dim / heads); embed_dim: width of the CLIP embeddings;
    text_dim: width of the text encodings; context_length: the most text positions.
    """

    def __init__(
        self,
        dim: int = 2048,
        depth: int = 20,
        heads: int = 32,
        dim_head: int | None = 64,
        *,
        embed_dim: int = 768,
        text_dim: int = 768,
        context_length: int = 77,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.config = dict(
            dim=dim, depth=depth, heads=heads, dim_head=dim_head, embed_dim=embed_dim, text_dim=text_dim,
            context_length=context_length, mlp_ratio=mlp_ratio,
        )
        self.dim, self.embed_dim, self.text_dim = dim, embed_dim, text_dim
        self.context_length = context_length
        self.time_embedding = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.proj_in = nn.Linear(embed_dim, dim)
        self.text_embed_proj = nn.Linear(embed_dim, dim)
        self.text_encodings_proj = nn.Linear(text_dim, dim)
        self.query = nn.Parameter(torch.empty(dim))
        self.positional_embedding = nn.Parameter(torch.empty(context_length + 1 + TAIL, dim))
        self.transformer = Transformer(dim, depth, heads, dim_head, mlp_ratio)
        self.ln_final = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, embed_dim)
        nn.init.normal_(self.query, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for linear in (self.time_embedding[0], self.time_embedding[2], self.proj_in, self.text_embed_proj,
                       self.text_encodings_proj, self.proj_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        hidden_states: Tensor,  # [B, E] noised image embedding
        timestep: Tensor,  # [B]
        proj_embedding: Tensor,  # [B, E] text embedding
        encoder_hidden_states: Tensor | None = None,  # [B, L, text_dim]
        attention_mask: Tensor | None = None,  # bool [B, L], True = attend
    ) -> Tensor:
        """Predicted image embedding [B, E]. The call shape is that of diffusers' PriorTransformer."""
        prefix, valid = self._embed_text(proj_embedding, encoder_hidden_states, attention_mask)
        tail = self._embed_tail(hidden_states, timestep)
        tokens = torch.cat([prefix, tail], dim=1)
        valid = F.pad(valid, (0, TAIL), value=True)
        tokens, lengths = pack(tokens, valid)
        x = self.transformer(tokens, causal=True)
        x = x[torch.arange(len(x), device=x.device), lengths - 1]
        return self.proj_out(self.ln_final(x))

    def denoise(self, hidden_states: Tensor, timestep: Tensor, prefix: Prefix) -> Tensor:
        """hidden_states [B, E], timestep [B] -> predicted image embedding [B, E], as `forward` gives it."""
        tail = self._embed_tail(hidden_states, timestep)
        batch = len(tail)
        causal = torch.ones(TAIL, TAIL, dtype=torch.bool, device=tail.device).tril()
        valid = prefix.valid[:, None, None, :].expand(batch, 1, TAIL, -1)
        mask = torch.cat([valid, causal.expand(batch, 1, TAIL, TAIL)], dim=-1)
        x = self.transformer.extend(tail, prefix.keys_values, mask)
        return self.proj_out(self.ln_final(x[:, -1]))

    def _embed_tail(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """-> tokens [B, 3, dim]: time, noised image embedding, query."""
        weight = self.proj_in.weight
        time = self.time_embedding(sinusoidal_embedding(timestep, self.dim).to(weight.dtype))
        noised = self.proj_in(hidden_states.to(weight.dtype))
        query = self.query.to(noised.dtype).expand_as(noised)
        tail = torch.stack([time.to(noised.dtype), noised, query], dim=1)
        return tail + self.positional_embedding[self.context_length + 1:].to(tail.dtype)


def pack(tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's valid tokens first, in order: [B, S, D], bool [B, S] -> ([B, S', D], lengths [B]).

    With the gaps at the end a causal pass never sees them: attention needs no mask and keeps its fast path.
    Positions were embedded before, so the result is that of masking. On the CPU the columns that no row uses
    are dropped; on a GPU, asking for their number would stall the queue.
    """
    lengths = valid.sum(dim=1)
    order = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and len(tokens):
        order = order[:, : int(lengths.max())]
    return tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2])), lengths
