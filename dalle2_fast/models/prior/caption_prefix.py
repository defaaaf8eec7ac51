"""The part of a prior's sequence that a caption fills: [text encodings, text embedding], always first.

Both networks are causal, so the keys and values of these positions do not depend on what follows them: they
are computed once per caption, by `encode_prefix`, and serve every sampling step. The functions take a network
with text_embed_proj, text_encodings_proj, positional_embedding (whose first context_length + 1 rows are the
caption's), context_length and transformer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PrefixCache:
    """Keys and values of every position so far, and which of them exist."""

    keys_values: list[tuple[Tensor, Tensor]]  # of each block, [B, H, P, D]
    valid: Tensor  # bool [B, P]

    def repeat_interleave(self, count: int) -> PrefixCache:
        """Each caption `count` times, side by side."""
        keys_values = [tuple(x.repeat_interleave(count, 0) for x in pair) for pair in self.keys_values]
        return PrefixCache(keys_values, self.valid.repeat_interleave(count, 0))


def encode_prefix(
    net: nn.Module,
    proj_embedding: Tensor,  # [B, E] text embedding
    encoder_hidden_states: Tensor | None = None,  # [B, L, text_dim]
    attention_mask: Tensor | None = None,  # bool [B, L], True = attend
) -> PrefixCache:
    """Compute the caption's part of the sequence once, for all that follows it."""
    tokens, valid = embed_caption(net, proj_embedding, encoder_hidden_states, attention_mask)
    tokens, lengths = pack(tokens, valid)
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return PrefixCache(net.transformer.prefill(tokens), valid)


def embed_caption(
    net: nn.Module, text_embed: Tensor, text_encodings: Tensor | None, text_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> (tokens [B, L + 1, dim], valid bool [B, L + 1])."""
    batch = len(text_embed)
    embed = net.text_embed_proj(text_embed)[:, None]
    embed = embed + net.positional_embedding[net.context_length].to(embed.dtype)
    if text_encodings is None:
        return embed, torch.ones(batch, 1, dtype=torch.bool, device=embed.device)
    length = text_encodings.shape[1]
    x = net.text_encodings_proj(text_encodings)
    x = x + net.positional_embedding[:length].to(x.dtype)
    if text_mask is None:
        text_mask = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    return torch.cat([x, embed], dim=1), F.pad(text_mask, (0, 1), value=True)


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
