"""The network of the diffusion prior: a causal Transformer over a caption and a noised image embedding.

    [text encodings, text embedding, time, noised image embedding, query] -> image embedding at the query.

Source: Ramesh et al., "unCLIP", 2204.06125, section 2.2; the defaults are those of the public Karlo prior.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.models.prior.caption_prefix import PrefixCache, embed_caption, encode_prefix, pack
from dalle2_fast.models.time_embedding import sinusoidal_embedding
from dalle2_fast.models.transformer import Transformer

TAIL = 3  # positions after the caption: time, noised embedding, query


class DiffusionPriorNetwork(nn.Module):
    """Causal Transformer over [text encodings, text embedding, time, noised image embedding, query].

    The defaults are Karlo's (20 layers of 32 heads of width 64).

    Args:
        dim: width of the tokens.
        depth: the number of blocks.
        heads: the number of attention heads.
        dim_head: width of a head; None is dim / heads.
        embed_dim: width of the CLIP embeddings.
        text_dim: width of the text encodings.
        context_length: the largest number of text positions.
        mlp_ratio: width of the hidden layer of the MLPs, as a multiple of dim.

    Example:
        >>> net = DiffusionPriorNetwork(8, 1, 2, 4, embed_dim=6, text_dim=5, context_length=3)
        >>> noised, time, text_embed = torch.randn(2, 6), torch.tensor([0.0, 9.0]), torch.randn(2, 6)
        >>> net(noised, time, text_embed, torch.randn(2, 3, 5)).shape
        torch.Size([2, 6])
        >>> net.denoise(noised, time, net.encode_prefix(text_embed)).shape
        torch.Size([2, 6])
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
        time_offset: Tensor | None = None,  # [B, dim]
    ) -> Tensor:
        """Predict the image embedding [B, E]. The arguments are those of diffusers' PriorTransformer, and
        time_offset, which is added to the token of the time."""
        prefix, valid = embed_caption(self, proj_embedding, encoder_hidden_states, attention_mask)
        tail = self._embed_tail(hidden_states, timestep, time_offset)
        tokens = torch.cat([prefix, tail], dim=1)
        valid = F.pad(valid, (0, TAIL), value=True)
        tokens, lengths = pack(tokens, valid)
        x = self.transformer(tokens, causal=True)
        x = x[torch.arange(x.shape[0], device=x.device), lengths - 1]
        return self.proj_out(self.ln_final(x))

    encode_prefix = encode_prefix

    def denoise(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        prefix: PrefixCache,
        time_offset: Tensor | None = None,
    ) -> Tensor:
        """Predict the image embedding [B, E] as `forward` does, from a cached prefix of the captions.

        Args:
            hidden_states: noised image embedding [B, E].
            timestep: times [B].
            prefix: the captions' part of the sequence, from `encode_prefix`.
            time_offset: is added to the token of the time, [B, dim].
        """
        tail = self._embed_tail(hidden_states, timestep, time_offset)
        batch = tail.shape[0]  # not len(tail), which is a constant in an exported program
        causal = torch.ones(TAIL, TAIL, dtype=torch.bool, device=tail.device).tril()
        valid = prefix.valid[:, None, None, :].expand(batch, 1, TAIL, -1)
        mask = torch.cat([valid, causal.expand(batch, 1, TAIL, TAIL)], dim=-1)
        x = self.transformer.extend(tail, prefix.keys_values, mask)
        return self.proj_out(self.ln_final(x[:, -1]))

    def _embed_tail(
        self, hidden_states: Tensor, timestep: Tensor, time_offset: Tensor | None = None
    ) -> Tensor:
        """The tokens [B, 3, dim] of time, noised image embedding and query."""
        weight = self.proj_in.weight
        time = self.time_embedding(sinusoidal_embedding(timestep, self.dim).to(weight.dtype))
        if time_offset is not None:
            time = time + time_offset
        noised = self.proj_in(hidden_states.to(weight.dtype))
        query = self.query.to(noised.dtype).expand_as(noised)
        tail = torch.stack([time.to(noised.dtype), noised, query], dim=1)
        return tail + self.positional_embedding[self.context_length + 1:].to(tail.dtype)
