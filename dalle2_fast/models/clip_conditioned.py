"""What prior and decoder share: embeddings of CLIP as conditions, and a frozen CLIP to compute them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.checkpoints import Pretrained
from dalle2_fast.models.captions import Caption
from dalle2_fast.ops._dtypes import compute_dtype

if TYPE_CHECKING:
    from dalle2_fast.models.clip.model import CLIP


class ClipConditioned(Pretrained, nn.Module):
    """A network conditioned on CLIP's embeddings.

    clip: computes embeddings from tokens and images. It is frozen: set to evaluation mode, used without
        gradients, and neither trained, moved nor saved with this network.
    unit_norm: whether embeddings are L2-normalised before they are scaled.
    embed_scale: factor on embeddings; None is sqrt(width), so that entries are of about unit size.
    """

    def __init__(self, clip: CLIP | None, unit_norm: bool, embed_scale: float | None):
        super().__init__()
        # In a tuple, so that it is no submodule: a checkpoint holds its weights once, under "clip.".
        self._clip = (None if clip is None else clip.eval(),)
        self.unit_norm, self.embed_scale = unit_norm, embed_scale

    @property
    def clip(self) -> CLIP | None:
        return self._clip[0]

    @torch.no_grad()
    def encode_with_clip(self, text: Tensor) -> Caption:  # int64 [B, L]
        """Captions encoded by the frozen CLIP."""
        return Caption(*self.clip.encode_text(text, normalize=self.unit_norm))

    @torch.no_grad()
    def embed_with_clip(self, image: Tensor) -> Tensor:  # [B, 3, S, S] in [0, 1] -> [B, E]
        """Image embeddings by the frozen CLIP."""
        return self.clip.encode_image(image, normalize=self.unit_norm)

    def scale_embedding(self, embed: Tensor) -> Tensor:  # [B, E]
        """An embedding of CLIP as the network sees it, float32 (float64 for such an embedding)."""
        embed = embed.to(compute_dtype(embed.dtype))
        embed = F.normalize(embed, dim=-1) if self.unit_norm else embed
        return embed * (math.sqrt(embed.shape[-1]) if self.embed_scale is None else self.embed_scale)
