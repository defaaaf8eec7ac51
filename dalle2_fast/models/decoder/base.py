"""What a decoder is told, from what its caller has: embeddings, captions, guidance's other rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.models.decoder.conditioning import Caption, ConditionProjection
from dalle2_fast.models.inputs import cat_padded
from dalle2_fast.models.transformer import TextTransformer
from dalle2_fast.models.unet.model import UNet

if TYPE_CHECKING:
    from dalle2_fast.models.clip.model import CLIP


class ConditionedDecoder(nn.Module):
    """A U-Net with its conditions. Subclasses set what is named here."""

    unet: UNet
    text_encoder: TextTransformer | None
    text_proj: ConditionProjection
    image_embed_dim: int
    text_embed_dim: int
    text_encoding_dim: int
    unit_norm: bool
    embed_scale: float | None

    def __init__(self, clip: CLIP | None):
        super().__init__()
        # In a tuple, so that it is not a submodule: its weights are in the checkpoint already, under "clip.".
        self._clip = (clip.eval() if clip is not None else None,)

    @property
    def clip(self) -> CLIP | None:
        return self._clip[0]

    def _conditioned(
        self,
        batch: int,
        image_embed: Tensor | None,
        caption: Caption | None,
        guidance: float | Tensor | None,
        negative: Tensor | tuple | None = None,
        extra: Tensor | None = None,  # [B, C', H, W], input channels beside x
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], float | Tensor | None]:
        """The network as GaussianDiffusion calls it, and the guidance to call it with (None for none)."""
        device = self.unet.conv_in.weight.device
        if not isinstance(guidance, Tensor) and guidance == 1.0:
            guidance = None
        keep_image = torch.full((batch,), image_embed is not None, device=device)
        keep_text = torch.full((batch,), caption is not None, device=device)
        context, mask, classes = self._condition(batch, image_embed, caption, keep_image, keep_text)
        if guidance is not None:
            nothing = torch.zeros_like(keep_image)
            other = self._negative(batch, negative)
            without = self._condition(batch, image_embed, other, nothing, ~nothing)
            context, mask, classes = (
                cat_padded(*pair) for pair in zip((context, mask, classes), without, strict=True)
            )
        cache = self.unet.encode_context(context, mask)  # the same at every step

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            if extra is not None:
                x = torch.cat([x, extra.to(x.dtype)], dim=1)
            if guidance is not None:
                x, t = torch.cat([x, x]), torch.cat([t, t])
            return self.unet(x, t, cache, classes)

        return denoise, guidance

    def _negative(self, batch: int, negative: Tensor | tuple | None) -> Caption | None:
        if negative is None:
            return None
        if isinstance(negative, Tensor):
            caption = self._caption(len(negative), negative, None, None, None)
        else:
            embed, encodings, mask = negative
            caption = self._caption(len(encodings), None, encodings, mask, embed)
        given = (caption.embed, caption.encodings, caption.mask)
        if len(caption.embed) not in (1, batch):
            raise ValueError(f"negative: expected 1 or {batch} captions, got {len(caption.embed)}")
        return Caption(*(x.expand(batch, *x.shape[1:]) for x in given))

    def _condition(
        self,
        batch: int,
        image_embed: Tensor | None,
        caption: Caption | None,
        keep_image: Tensor,
        keep_text: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.text_proj.image_to_time.weight
        if image_embed is None:
            image_embed = weight.new_zeros(batch, self.image_embed_dim)
            keep_image = torch.zeros_like(keep_image)
        else:
            self._check_shape("image_embed", image_embed, "B, E", (batch, self.image_embed_dim))
            image_embed = self._scaled(image_embed).to(weight.dtype)
        if caption is None:
            caption = Caption(
                weight.new_zeros(batch, self.text_embed_dim),
                weight.new_zeros(batch, 1, self.text_encoding_dim),
                torch.ones(batch, 1, dtype=torch.bool, device=weight.device),
            )
            keep_text = torch.zeros_like(keep_text)
        return self.text_proj(image_embed, caption, keep_image, keep_text)

    def _scaled(self, embed: Tensor) -> Tensor:
        embed = embed if embed.dtype == torch.float64 else embed.float()
        embed = F.normalize(embed, dim=-1) if self.unit_norm else embed
        return embed * (math.sqrt(embed.shape[-1]) if self.embed_scale is None else self.embed_scale)

    def _embed_image(self, image: Tensor) -> Tensor:
        if self.clip is None:
            raise ValueError(
                "image_embed: expected [B, E], got None; only a decoder built with clip=... can compute it"
            )
        side = self.clip.image_size
        with torch.no_grad():
            if image.shape[-1] != side:
                image = F.interpolate(image, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
            return self.clip.encode_image(image, normalize=self.unit_norm)

    def _caption(
        self,
        batch: int,
        text: Tensor | None,
        encodings: Tensor | None,
        mask: Tensor | None,
        embed: Tensor | None,
    ) -> Caption | None:
        weight = self.text_proj.text_to_context.weight
        if text is not None:
            if encodings is not None or mask is not None or embed is not None:
                raise ValueError(
                    "text: expected either text or text_encodings (with text_mask, text_embed), got both"
                )
            if self.text_encoder is not None:
                encodings, mask = self.text_encoder.encode_tokens(text)
            elif self.clip is not None:
                with torch.no_grad():
                    embed, encodings, mask = self.clip.encode_text(text, normalize=self.unit_norm)
            else:
                raise ValueError(
                    "text: expected a decoder with a text_encoder or clip to encode it; this one has "
                    "neither: pass text_encodings, text_mask and text_embed"
                )
        elif encodings is None:
            if mask is not None or embed is not None:
                raise ValueError("text_mask, text_embed: expected only together with text_encodings")
            return None
        length = encodings.shape[1] if encodings.ndim == 3 else "L"
        self._check_shape(
            "text" if text is not None else "text_encodings",
            encodings,
            "B, L, D",
            (batch, length, self.text_encoding_dim),
        )
        if mask is None:
            mask = torch.ones(encodings.shape[:2], dtype=torch.bool, device=encodings.device)
        elif mask.dtype != torch.bool or mask.shape != encodings.shape[:2]:
            raise ValueError(
                f"text_mask: expected bool [B, L] = {tuple(encodings.shape[:2])}, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        if embed is not None:
            self._check_shape("text_embed", embed, "B, E", (batch, self.text_embed_dim))
            embed = self._scaled(embed)
        elif self.text_encoder is not None:
            embed = encodings[torch.arange(batch, device=encodings.device), _last_token(mask)]
        else:
            raise ValueError(
                "text_embed: expected [B, E] beside text_encodings, got None (only a decoder with its own "
                "text_encoder reads it from the encodings)"
            )
        # On the CPU padding that no caption of the batch uses is cut off. On a GPU, to know the longest
        # caption would stall the queue.
        if mask.device.type == "cpu" and batch and not torch.compiler.is_compiling():
            longest = int(_last_token(mask).max()) + 1
            encodings, mask = encodings[:, :longest], mask[:, :longest]
        return Caption(embed.to(weight.dtype), encodings.to(weight.dtype), mask)

    @staticmethod
    def _check_shape(name: str, value: Tensor, letters: str, expected: tuple) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a floating-point tensor [{letters}] = {expected}, got {came}")
        if tuple(value.shape) != expected:
            raise ValueError(f"{name}: expected [{letters}] = {expected}, got {tuple(value.shape)}")


def _last_token(mask: Tensor) -> Tensor:
    """Position of the last True of each row of bool [B, L] (0 when there is none): int64 [B]."""
    return (torch.arange(mask.shape[1], device=mask.device) * mask).amax(dim=1)
