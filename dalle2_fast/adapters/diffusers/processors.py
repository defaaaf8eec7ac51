"""Attention processors for diffusers' `set_attn_processor`, which run the fused op."""

from __future__ import annotations

from torch import Tensor, nn

from dalle2_fast.adapters.diffusers.attention import attend, attend_added_kv
from dalle2_fast.adapters.diffusers.masks import is_key_mask


class FusedAttnProcessor:
    """diffusers' AttnProcessor2_0 with the fused op: self- or cross-attention.

    Args of a call:
        attn: diffusers' `Attention`.
        hidden_states: [B, T, C] or [B, C, H, W].
        encoder_hidden_states: the context [B, S, E]; None for self-attention.
        attention_mask: one mask for all queries, [B, S] or [B, 1, S]: bool (True = attend), or additive with
            0 (attend) and at most -1000 (do not attend).
        temb: for a spatial norm.

    Returns:
        A tensor of the shape of hidden_states.

    Raises:
        ValueError: the mask has another shape.
        RuntimeError: an additive mask has other values.

    Example:
        >>> import torch
        >>> from dalle2_fast.adapters.diffusers import AttnProcessor
        >>> from diffusers.models.attention_processor import Attention
        >>> attention = Attention(query_dim=8, heads=2, dim_head=4)
        >>> attention.set_processor(AttnProcessor())  # or unet.set_attn_processor(AttnProcessor())
        >>> attention(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        _check_mask(attention_mask, hidden_states)
        return attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class FusedAttnAddedKVProcessor:
    """diffusers' AttnAddedKVProcessor2_0 with the fused op: context and image in one softmax.

    Arguments, results and errors are those of `AttnProcessor`, without temb. The mask is that of the context;
    the keys of the image are always visible.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        _check_mask(attention_mask, hidden_states)
        return attend_added_kv(attn, hidden_states, encoder_hidden_states, attention_mask)


def _check_mask(mask: Tensor | None, hidden_states: Tensor) -> None:
    batch = hidden_states.shape[0]
    if not is_key_mask(mask, batch):
        raise ValueError(
            f"attention_mask: expected one for all queries, [B, 1, S] with B = {batch}, got "
            f"{tuple(mask.shape)}"
        )
