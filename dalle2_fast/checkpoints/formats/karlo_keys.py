"""Which tensors of Karlo make our prior and the conditioning of our decoder, in both layouts of its files.

unet_keys.py says the same of the U-Nets. A new layout of Karlo is a column in the tables below.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dalle2_fast.checkpoints.formats.renaming import (
    MadeFrom,
    Rules,
    parts_first,
    prefixed,
    renamed,
    stack_rows,
)

HEAD_DIM = 64
ORIGINAL, DIFFUSERS = 0, 1  # columns of the tables below

_PRIOR = {
    # ours: (the original's, diffusers')
    "time_embedding.0": ("time_embed.0", "time_embedding.linear_1"),
    "time_embedding.2": ("time_embed.2", "time_embedding.linear_2"),
    "proj_in": ("clip_img_proj", "proj_in"),
    "text_embed_proj": ("text_emb_proj", "embedding_proj"),
    "text_encodings_proj": ("text_enc_proj", "encoder_hidden_states_proj"),
    "ln_final": ("final_ln", "norm_out"),
    "proj_out": ("out_proj", "proj_to_clip_embeddings"),
}
_QUERY = ("prd_emb", "prd_embedding")
_BLOCKS = ("transformer.resblocks", "transformer_blocks")
_BLOCK = {
    "ln_1": ("ln_1", "norm1"),
    "attn.out_proj": ("attn.c_proj", "attn1.to_out.0"),
    "ln_2": ("ln_2", "norm3"),
    "mlp.c_fc": ("mlp.c_fc", "ff.net.0.proj"),
    "mlp.c_proj": ("mlp.c_proj", "ff.net.2"),
}
_CONDITIONING = {
    "image_to_time": ("clip_emb", "clip_image_embeddings_project_to_time_embeddings"),
    "image_to_tokens": ("clip_tok_proj", "clip_extra_context_tokens_proj"),
    "text_to_time": ("text_feat_proj", "embedding_proj"),
    "text_to_context": ("text_seq_proj.0", "encoder_hidden_states_proj"),
    "text_norm": ("text_seq_proj.1", "text_encoder_hidden_states_norm"),
}
_NULL_IMAGE = ("cf_param", "learned_classifier_free_guidance_embeddings")


def original_prior_rules(depth: int) -> Rules:
    """The rules for the original prior; its file lacks the statistics of the embeddings.

    Args:
        depth: blocks of the Transformer.
    """

    def fused_qkv(block: str, kind: str) -> MadeFrom:
        return MadeFrom((f"{block}.attn.c_qkv.{kind}",), parts_first(3, HEAD_DIM))

    return prefixed("net.", _prior_rules(ORIGINAL, depth, fused_qkv), "model.")


def diffusers_prior_rules(depth: int) -> Rules:
    """The rules for a PriorTransformer of diffusers.

    Args:
        depth: blocks of the Transformer.
    """

    def fused_qkv(block: str, kind: str) -> MadeFrom:
        return MadeFrom(tuple(f"{block}.attn1.to_{part}.{kind}" for part in "qkv"), stack_rows)

    statistics = {name: MadeFrom((name,), lambda x: x.flatten()) for name in ("clip_mean", "clip_std")}
    return prefixed("net.", _prior_rules(DIFFUSERS, depth, fused_qkv)) | statistics


def _prior_rules(column: int, depth: int, fused_qkv: Callable[[str, str], MadeFrom]) -> Rules:
    rules: Rules = {}
    for ours, theirs in _PRIOR.items():
        rules |= renamed(ours, theirs[column])
    rules["query"] = MadeFrom((_QUERY[column],), lambda x: x.flatten())
    rules["positional_embedding"] = MadeFrom(("positional_embedding",), lambda x: x.flatten(0, 1))
    for index in range(depth):
        block, theirs_block = f"transformer.resblocks.{index}", f"{_BLOCKS[column]}.{index}"
        for ours, theirs in _BLOCK.items():
            rules |= renamed(f"{block}.{ours}", f"{theirs_block}.{theirs[column]}")
        for kind in ("weight", "bias"):
            rules[f"{block}.attn.in_proj_{kind}"] = fused_qkv(theirs_block, kind)
    return rules


def original_conditioning_rules(tokens: int) -> Rules:
    """The rules for the conditioning in the file of the original decoder.

    Args:
        tokens: context tokens that are made from an image embedding.
    """
    return prefixed("text_proj.", _conditioning_rules(ORIGINAL, tokens), "model.")


def diffusers_conditioning_rules(tokens: int) -> Rules:
    """The rules for an UnCLIPTextProjModel of diffusers.

    Args:
        tokens: context tokens that are made from an image embedding.
    """
    return prefixed("text_proj.", _conditioning_rules(DIFFUSERS, tokens))


def _conditioning_rules(column: int, tokens: int) -> Rules:
    def token_after_token(rows: Tensor) -> Tensor:
        """Rows [width, tokens] -> [tokens, width]: Karlo interleaves the context tokens in the projection."""
        return rows.unflatten(0, (-1, tokens)).transpose(0, 1).flatten(0, 1)

    rules: Rules = {"null_image_embed": MadeFrom((_NULL_IMAGE[column],))}
    for ours, theirs in _CONDITIONING.items():
        rules |= renamed(ours, theirs[column], token_after_token if ours == "image_to_tokens" else None)
    return rules
