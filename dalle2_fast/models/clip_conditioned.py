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
    """A network that is conditioned on embeddings of CLIP.

    Args:
        clip: computes embeddings from tokens and images. It is frozen: set to evaluation mode, used without
            gradients, and neither trained, moved nor saved with this network. None: the caller passes
            embeddings.
        unit_norm: whether embeddings are L2-normalised before they are scaled.
        embed_scale: factor on embeddings; None is sqrt(width), which gives the entries about unit size.

    Example:
        >>> network = ClipConditioned(None, unit_norm=True, embed_scale=None)
        >>> network.scale_embedding(torch.tensor([[3.0, 0.0, 0.0, 0.0]]))
        tensor([[2., 0., 0., 0.]])
    """

    consistency_steps: int | None = None  # of the class, because pickles of version 0.1.0 do not have it

    def __init__(self, clip: CLIP | None, unit_norm: bool, embed_scale: float | None):
        super().__init__()
        # The tuple hides CLIP from nn.Module, so that it is no submodule: a checkpoint then holds its weights
        # only once, under "clip.".
        self._clip = (None if clip is None else clip.eval(),)
        self.unit_norm, self.embed_scale = unit_norm, embed_scale
        self.guidance_input: nn.Module | None = None

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "guidance_input" not in self._modules:  # a pickle of version 0.1.0 has none
            self.__dict__.setdefault("guidance_input", None)

    @property
    def clip(self) -> CLIP | None:
        """The frozen CLIP, or None."""
        return self._clip[0]

    @torch.no_grad()
    def encode_with_clip(self, text: Tensor) -> Caption:  # int64 [B, L]
        """Encode captions with the frozen CLIP."""
        return Caption(*self.clip.encode_text(text, normalize=self.unit_norm))

    @torch.no_grad()
    def embed_with_clip(self, image: Tensor) -> Tensor:  # [B, 3, S, S] in [0, 1] -> [B, E]
        """Embed images with the frozen CLIP."""
        return self.clip.encode_image(image, normalize=self.unit_norm)

    def scale_embedding(self, embed: Tensor) -> Tensor:  # [B, E]
        """Normalise and scale an embedding of CLIP, in float32 (float64 for a float64 embedding)."""
        embed = embed.to(compute_dtype(embed.dtype))
        embed = F.normalize(embed, dim=-1) if self.unit_norm else embed
        return embed * (math.sqrt(embed.shape[-1]) if self.embed_scale is None else self.embed_scale)
