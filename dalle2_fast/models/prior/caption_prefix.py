"""The caption's part of the sequence of a prior: [text encodings, text embedding], always at the start.

The networks of both priors are causal, so the keys and values of these positions do not depend on later
positions. `encode_prefix` computes them once per caption, for all sampling steps.

The functions take a network that has text_embed_proj, text_encodings_proj, positional_embedding (of which the
first context_length + 1 rows belong to the caption), context_length and transformer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PrefixCache:
    """Keys and values of the P positions so far.

    Args:
        keys_values: the pair of each block, [B, H, P, D] each.
        valid: bool [B, P], False where a shorter caption has no position.

    Example:
        >>> cache = PrefixCache([(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))], torch.ones(2, 3) > 0)
        >>> cache.repeat_interleave(2).valid.shape
        torch.Size([4, 3])
    """

    keys_values: list[tuple[Tensor, Tensor]]
    valid: Tensor

    def repeat_interleave(self, count: int) -> PrefixCache:
        """Repeat each caption `count` times, next to each other."""
        keys_values = [tuple(x.repeat_interleave(count, 0) for x in pair) for pair in self.keys_values]
        return PrefixCache(keys_values, self.valid.repeat_interleave(count, 0))

    def first(self, rows: int) -> PrefixCache:
        """The cache of the first `rows` rows of the batch, without a copy."""
        return PrefixCache([(k[:rows], v[:rows]) for k, v in self.keys_values], self.valid[:rows])


def encode_prefix(
    net: nn.Module,
    proj_embedding: Tensor,  # [B, E] text embedding
    encoder_hidden_states: Tensor | None = None,  # [B, L, text_dim]
    attention_mask: Tensor | None = None,  # bool [B, L], True = attend
) -> PrefixCache:
    """Compute the keys and values of the caption once, for every position that follows.

    Example:
        >>> from dalle2_fast.models.prior import DiffusionPriorNetwork
        >>> net = DiffusionPriorNetwork(8, 1, 2, 4, embed_dim=6, text_dim=5, context_length=3)
        >>> encode_prefix(net, torch.randn(2, 6), torch.randn(2, 3, 5)).valid.shape
        torch.Size([2, 4])
    """
    tokens, valid = embed_caption(net, proj_embedding, encoder_hidden_states, attention_mask)
    tokens, lengths = pack(tokens, valid)
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return PrefixCache(net.transformer.prefill(tokens), valid)


def embed_caption(
    net: nn.Module, text_embed: Tensor, text_encodings: Tensor | None, text_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The caption's tokens [B, L + 1, dim], and which of them exist, bool [B, L + 1]."""
    batch = text_embed.shape[0]  # not len(), which is a constant in an exported program
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
    """Move the valid tokens of each row to the front, in order.

    A causal pass then never sees the gaps, so that attention needs no mask and keeps its fast path. The
    positions are embedded before, so the result equals that of masking. On a CPU the columns that no row uses
    are dropped; on a GPU, reading their number would stall the queue.

    Args:
        tokens: [B, S, D].
        valid: bool [B, S].

    Returns:
        Tokens [B, S', D] with S' <= S, and the number of valid ones per row, [B].

    Example:
        >>> tokens, valid = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[True, False, True]])
        >>> pack(tokens, valid)
        (tensor([[[1.],
                 [3.]]]), tensor([2]))
    """
    lengths = valid.sum(dim=1)
    # The keys of the positions differ, so that no stable sort is needed, which ONNX does not have.
    positions = torch.arange(valid.shape[1], device=tokens.device)
    order = torch.argsort(torch.where(valid, positions, positions + valid.shape[1]), dim=1)
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and len(tokens):
        order = order[:, : int(lengths.max())]
    return tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2])), lengths
