"""The network of the autoregressive prior: a causal Transformer that predicts an embedding bucket by bucket.

    [text encodings, text embedding, z_i . z_t, z_1, ..., z_{K-1}] -> logits of z_1, ..., z_K

Source: Ramesh et al., "unCLIP", 2204.06125, section 2.2; the default size is that of its appendix C (width
1664, 24 layers, 26 heads, 319 dimensions of 1024 buckets).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.models.prior.caption_prefix import PrefixCache, embed_caption, encode_prefix, pack
from dalle2_fast.models.transformer import Transformer


class ARPriorNetwork(nn.Module):
    """Causal Transformer over a caption, the bucket of z_i . z_t and those of the first K - 1 dimensions.

    All dimensions share one embedding table and one output layer; the positional embedding tells them apart.

    Args:
        dim: width of the tokens.
        depth: the number of blocks.
        heads: the number of attention heads.
        dim_head: width of a head; None is dim / heads.
        embed_dim: width E of the CLIP embeddings.
        text_dim: width of the text encodings.
        context_length: the largest number of text positions.
        mlp_ratio: width of the hidden layer of the MLPs, as a multiple of dim.
        num_components: K, the number of dimensions that are predicted, 1 .. E.
        num_buckets: the number of buckets of each dimension, >= 2.
        num_dot_buckets: the number of buckets of the dot product, >= 2. Its table has one more row, for a
            dot product that is not given.

    Raises:
        ValueError: num_components or a number of buckets is out of range.

    Example:
        >>> net = ARPriorNetwork(8, 1, 2, embed_dim=6, text_dim=5, context_length=3, num_components=4,
        ...                      num_buckets=7, num_dot_buckets=5)
        >>> net(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([0, 5]), torch.randn(2, 6)).shape
        torch.Size([2, 4, 7])
    """

    def __init__(
        self,
        dim: int = 1664,
        depth: int = 24,
        heads: int = 26,
        dim_head: int | None = None,
        *,
        embed_dim: int = 768,
        text_dim: int = 768,
        context_length: int = 77,
        mlp_ratio: float = 4.0,
        num_components: int = 319,
        num_buckets: int = 1024,
        num_dot_buckets: int = 1024,
    ):
        super().__init__()
        if not 1 <= num_components <= embed_dim:
            raise ValueError(f"num_components: expected 1 to embed_dim = {embed_dim}, got {num_components}")
        for name, value in (("num_buckets", num_buckets), ("num_dot_buckets", num_dot_buckets)):
            if value < 2:
                raise ValueError(f"{name}: expected at least 2, got {value}")
        self.config = dict(
            dim=dim, depth=depth, heads=heads, dim_head=dim_head, embed_dim=embed_dim, text_dim=text_dim,
            context_length=context_length, mlp_ratio=mlp_ratio, num_components=num_components,
            num_buckets=num_buckets, num_dot_buckets=num_dot_buckets,
        )
        self.dim, self.embed_dim, self.text_dim = dim, embed_dim, text_dim
        self.context_length = context_length
        self.num_components, self.num_buckets = num_components, num_buckets
        self.num_dot_buckets = num_dot_buckets
        self.text_embed_proj = nn.Linear(embed_dim, dim)
        self.text_encodings_proj = nn.Linear(text_dim, dim)
        self.dot_embedding = nn.Embedding(num_dot_buckets + 1, dim)
        self.code_embedding = nn.Embedding(num_buckets, dim)
        self.positional_embedding = nn.Parameter(torch.empty(context_length + 1 + num_components, dim))
        self.transformer = Transformer(dim, depth, heads, dim_head, mlp_ratio)
        self.ln_final = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, num_buckets)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for table in (self.dot_embedding, self.code_embedding):
            nn.init.normal_(table.weight, std=0.02)
        for linear in (self.text_embed_proj, self.text_encodings_proj, self.proj_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        codes: Tensor,  # int64 [B, K], buckets 0 .. num_buckets - 1 (the last column is not read)
        dot_codes: Tensor,  # int64 [B], 0 .. num_dot_buckets - 1, or num_dot_buckets: not given
        proj_embedding: Tensor,  # [B, E] text embedding
        encoder_hidden_states: Tensor | None = None,  # [B, L, text_dim]
        attention_mask: Tensor | None = None,  # bool [B, L], True = attend
    ) -> Tensor:
        """Logits [B, K, num_buckets] of every dimension, given the true buckets of those before it."""
        prefix, valid = embed_caption(self, proj_embedding, encoder_hidden_states, attention_mask)
        tail = torch.cat([self.dot_embedding(dot_codes)[:, None], self.code_embedding(codes[:, :-1])], dim=1)
        tail = tail + self.positional_embedding[self.context_length + 1 :].to(tail.dtype)
        tokens = torch.cat([prefix, tail.to(prefix.dtype)], dim=1)
        tokens, lengths = pack(tokens, F.pad(valid, (0, self.num_components), value=True))
        x = self.transformer(tokens, causal=True)
        positions = lengths[:, None] + torch.arange(-self.num_components, 0, device=x.device)
        x = x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))
        return self.proj_out(self.ln_final(x))

    encode_prefix = encode_prefix

    def extend(
        self,
        codes: Tensor,  # int64 [B]
        position: int,
        prefix: PrefixCache,
    ) -> tuple[Tensor, PrefixCache]:
        """Compute one more position after the cached ones, as `forward` would.

        Args:
            codes: the buckets at this position.
            position: 0: the codes are of the dot product; k: of dimension k, counted from 1.
            prefix: the cache of the positions before.

        Returns:
            The logits [B, num_buckets] of the next dimension, and the cache with this position.
        """
        table = self.dot_embedding if position == 0 else self.code_embedding
        x = table(codes)[:, None]
        x = x + self.positional_embedding[self.context_length + 1 + position].to(x.dtype)
        valid = F.pad(prefix.valid, (0, 1), value=True)
        keys_values = []
        for block, past in zip(self.transformer.resblocks, prefix.keys_values, strict=True):
            x, grown = block(x, past=past, mask=valid[:, None, None, :])
            keys_values.append(grown)
        return self.proj_out(self.ln_final(x[:, 0])), PrefixCache(keys_values, valid)
