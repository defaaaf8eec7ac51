"""From what a caller passes to a decoder to what conditions it: image embeddings and encoded captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.models.captions import Caption, check_encodings
from dalle2_fast.models.inputs import check_features

if TYPE_CHECKING:
    from dalle2_fast.models.decoder.model import Decoder


def embed_images(decoder: Decoder, image: Tensor) -> Tensor:  # [B, C, H, W] in [0, 1] -> [B, E]
    """Embed images with the decoder's CLIP, resized to the size that CLIP takes.

    Raises:
        ValueError: the decoder has no CLIP.
    """
    if decoder.clip is None:
        raise ValueError(
            "image_embed: expected [B, E], got None; only a decoder built with clip=... can compute it"
        )
    side = decoder.clip.image_size
    if image.shape[-1] != side:
        with torch.no_grad():
            image = F.interpolate(image, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return decoder.embed_with_clip(image)


def encode_captions(
    decoder: Decoder,
    batch: int,
    text: Tensor | None,  # int64 [B, L]
    encodings: Tensor | None,  # [B, L, D]
    mask: Tensor | None,  # bool [B, L]
    embed: Tensor | None,  # [B, E]
) -> Caption | None:
    """Encode and check the captions of a batch.

    Args:
        decoder: its text_encoder or its CLIP encodes tokens.
        batch: the number of captions that are expected.
        text: token ids; either these, or encodings.
        encodings: encodings of the tokens.
        mask: which positions of the encodings are tokens; None for all.
        embed: one vector per caption. None takes the encoding of the last token, if the decoder has a
            text_encoder.

    Returns:
        The captions in the dtype of the weights with a scaled embedding, or None if nothing was given.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape, is missing or superfluous, or nothing
            can encode the tokens.
    """
    if text is not None:
        if encodings is not None or mask is not None or embed is not None:
            raise ValueError(
                "text: expected either text or text_encodings (with text_mask, text_embed), got both"
            )
        if decoder.text_encoder is not None:
            encodings, mask = decoder.text_encoder.encode_tokens(text)
        elif decoder.clip is not None:
            caption = decoder.encode_with_clip(text)
            embed, encodings, mask = caption.embed, caption.encodings, caption.mask
        else:
            raise ValueError(
                "text: expected a decoder with a text_encoder or clip to encode it; this one has "
                "neither: pass text_encodings, text_mask and text_embed"
            )
    elif encodings is None:
        if mask is not None or embed is not None:
            raise ValueError("text_mask, text_embed: expected only together with text_encodings")
        return None
    name = "text" if text is not None else "text_encodings"
    check_encodings(encodings, mask, batch, decoder.text_encoding_dim, name=name)
    if mask is None:
        mask = torch.ones(encodings.shape[:2], dtype=torch.bool, device=encodings.device)
    if embed is not None:
        check_features("text_embed", embed, "B, E", (batch, decoder.text_embed_dim))
        embed = decoder.scale_embedding(embed)
    elif decoder.text_encoder is not None:
        embed = encodings[torch.arange(batch, device=encodings.device), last_token(mask)]
    else:
        raise ValueError(
            "text_embed: expected [B, E] together with text_encodings, got None (only a decoder with a "
            "text_encoder takes it from the encodings)"
        )
    # On a CPU the padding that no caption of the batch uses is cut off. On a GPU, reading the length of the
    # longest caption would stall the queue.
    if mask.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        longest = int(last_token(mask).max()) + 1
        encodings, mask = encodings[:, :longest], mask[:, :longest]
    dtype = decoder.text_proj.text_to_context.weight.dtype
    return Caption(embed.to(dtype), encodings.to(dtype), mask)


def encode_negative(decoder: Decoder, batch: int, negative: Tensor | tuple | None) -> Caption | None:
    """Encode the captions that guidance leads away from.

    Args:
        decoder: see `encode_captions`.
        batch: the number of rows.
        negative: 1 or `batch` captions, as token ids int64 [1 or B, L] or as the tuple (embedding, encodings,
            mask) of `CLIP.encode_text`; None for none.

    Returns:
        One caption per row, or None.

    Raises:
        ValueError: the number of captions is neither 1 nor `batch`.
    """
    if negative is None:
        return None
    if isinstance(negative, Tensor):
        caption = encode_captions(decoder, len(negative), negative, None, None, None)
    else:
        embed, encodings, mask = negative
        caption = encode_captions(decoder, len(encodings), None, encodings, mask, embed)
    if len(caption.embed) not in (1, batch):
        raise ValueError(f"negative: expected 1 or {batch} captions, got {len(caption.embed)}")
    return caption.expand(batch)


def last_token(mask: Tensor) -> Tensor:
    """The position of the last True in each row of bool [B, L], or 0 if there is none: int64 [B].

    Example:
        >>> last_token(torch.tensor([[True, True, False], [False, False, False]]))
        tensor([1, 0])
    """
    return (torch.arange(mask.shape[1], device=mask.device) * mask).amax(dim=1)
