"""Our CLIP with the interface that DALLE2-pytorch expects of a `clip`, and the base of all its adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast import models


class Adapted:
    """The base of the mixins. It initialises nn.Module only: DALLE2-pytorch's __init__ would build its
    networks.

    clip_adapter: the class that wraps a CLIP for DALLE2-pytorch.
    """

    clip_adapter: type

    def __init__(self) -> None:
        nn.Module.__init__(self)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _adapted_clip(self, clip: models.CLIP | None) -> nn.Module | None:
        return None if clip is None else self.clip_adapter(clip).requires_grad_(False)


class AdaptedClip(Adapted):
    """A `dalle2_fast.CLIP` where DALLE2-pytorch's `Decoder`, `DiffusionPrior` and trainers expect a `clip`.

    Args:
        clip: computes the embeddings, without gradients. Captions are token ids of its tokenizer.

    Raises:
        TypeError: clip is of another class.
        ImportError: DALLE2-pytorch is not installed.

    Example::

        from dalle2_fast.adapters.dalle2_pytorch import ClipAdapter
        prior = dalle2_pytorch.DiffusionPrior(net, clip=ClipAdapter(clip))
    """

    embedded_text: Callable  # DALLE2-pytorch's named tuples of results
    embedded_image: Callable

    def __init__(self, clip: models.CLIP) -> None:
        super().__init__()
        check_class("clip", clip, models.CLIP)
        self.clip, self.overrides = clip, {}

    @property
    def dim_latent(self) -> int:
        return self.clip.dim_latent

    @property
    def image_size(self) -> int:
        return self.clip.image_size

    @property
    def image_channels(self) -> int:
        return 3

    @property
    def max_text_len(self) -> int:
        return self.clip.context_length

    @torch.no_grad()
    def embed_text(self, text: Tensor):
        """Embed captions.

        Args:
            text: int64 token ids [B, L].

        Returns:
            (embeddings [B, E] of unit norm, token encodings [B, L, D]), float32. Encodings of padding are
            zero, by which DALLE2-pytorch recognises it.
        """
        embed, encodings, mask = self.clip.encode_text(text[:, : self.max_text_len])
        return self.embedded_text(embed.float(), encodings.float() * mask[..., None])

    @torch.no_grad()
    def embed_image(self, image: Tensor):
        """Embed images.

        Args:
            image: [B, 3, H, W] in [0, 1], of any size.

        Returns:
            (embeddings [B, E] of unit norm, float32; None).
        """
        return self.embedded_image(self.clip.encode_image(resize(image, self.image_size)).float(), None)


def check_class(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a dalle2_fast.{kind.__name__}, got {type(value).__name__}")


def caption_mask(encodings: Tensor | None) -> Tensor | None:  # [B, L, D] -> bool [B, L]
    """The tokens of a caption. DALLE2-pytorch marks padding by encodings of zeros."""
    return None if encodings is None else (encodings != 0).any(-1)


def resize(image: Tensor, side: int) -> Tensor:
    """Bicubic and antialiased. DALLE2-pytorch takes the nearest pixels, so it trains on aliased images."""
    if tuple(image.shape[-2:]) == (side, side):
        return image
    return F.interpolate(image, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
