"""The computation of diffusers' AttnProcessor2_0 and AttnAddedKVProcessor2_0 with the fused op.

attn is diffusers' `Attention`. Only its attributes are used; the package is not imported.
"""

from __future__ import annotations

from torch import Tensor, nn

from dalle2_fast import functional
from dalle2_fast.adapters.context_cache import project
from dalle2_fast.adapters.diffusers.masks import visible_keys


def attend(
    attn: nn.Module,
    hidden_states: Tensor,  # [B, T, C] or [B, C, H, W]
    encoder_hidden_states: Tensor | None = None,  # [B, S, E]
    attention_mask: Tensor | None = None,  # see is_key_mask
    temb: Tensor | None = None,
) -> Tensor:  # of the shape of hidden_states
    """AttnProcessor2_0: self- or cross-attention, with the norms of `attn` around it.

    A query whose keys are all masked gives zeros, whereas AttnProcessor2_0 then ignores the mask.
    """
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    shape = hidden_states.shape
    if attn.group_norm is not None:  # on [B, C, ...], the layout that the norm reads
        hidden_states = attn.group_norm(hidden_states if len(shape) == 4 else hidden_states.transpose(1, 2))
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    elif len(shape) == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)

    q = _heads(attn, attn.to_q(hidden_states))
    if encoder_hidden_states is None:
        k, v = attn.to_k(hidden_states), attn.to_v(hidden_states)
    else:
        k, v = _context(attn, encoder_hidden_states, attn.to_k, attn.to_v)
    k, v = _heads(attn, k), _heads(attn, v)
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    out = functional.cross_attention(q, k, v, visible_keys(attention_mask, k.shape[2]))
    out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))

    if len(shape) == 4:
        out = out.transpose(1, 2).reshape(shape)
    if attn.residual_connection:
        out = out + residual
    return out / attn.rescale_output_factor


def attend_added_kv(
    attn: nn.Module,
    hidden_states: Tensor,  # [B, C, H, W] or [B, C, T]
    encoder_hidden_states: Tensor | None = None,  # [B, S, E]
    attention_mask: Tensor | None = None,  # see is_key_mask; for the context, image keys are always visible
) -> Tensor:  # of the shape of hidden_states
    """AttnAddedKVProcessor2_0: one softmax over the keys of context and image, without concatenation."""
    residual = hidden_states
    context = encoder_hidden_states
    if context is None:  # as in diffusers: the image before its norm
        context = hidden_states.flatten(2).transpose(1, 2)
    hidden_states = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)

    q = _heads(attn, attn.to_q(hidden_states))
    context_k, context_v = _context(attn, context, attn.add_k_proj, attn.add_v_proj)
    context_k, context_v = _heads(attn, context_k), _heads(attn, context_v)
    image_k = image_v = None
    if not attn.only_cross_attention:
        image_k, image_v = _heads(attn, attn.to_k(hidden_states)), _heads(attn, attn.to_v(hidden_states))
    mask = visible_keys(attention_mask, context_k.shape[2])
    out = functional.cross_attention(q, context_k, context_v, mask, image_k, image_v)
    out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
    return out.transpose(1, 2).reshape(residual.shape) + residual


def _heads(attn: nn.Module, x: Tensor) -> Tensor:  # [B, T, H D] -> [B, H, T, D]
    return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def _context(attn: nn.Module, context: Tensor, to_k: nn.Module, to_v: nn.Module) -> tuple[Tensor, Tensor]:
    if attn.norm_cross is not None:
        context = attn.norm_encoder_hidden_states(context)
    return project(attn, context, to_k, to_v)
