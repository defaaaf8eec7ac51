"""The conditions of the decoder: an image embedding and a caption become a class embedding and a context.

    classes = W_z z + W_t z_t,   context = [W_tokens z (4 tokens), LayerNorm(W_y encodings)]

With Karlo's widths the projections have 7,878,400 parameters.

Source: Ramesh et al., "unCLIP", 2204.06125, section 2.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.models.captions import Caption


class ConditionProjection(nn.Module):
    """Image embeddings and captions -> class embedding and context of the U-Net.

    A dropped image embedding is replaced by a learned vector. A dropped caption is replaced by a zero
    embedding and one token of zeros. The U-Net then receives the biases of the projections, which are learned
    as well and need no further parameters.

    Args:
        image_embed_dim: width of the image embeddings.
        text_embed_dim: width of the caption's one vector.
        text_encoding_dim: width of the caption's token encodings.
        embed_dim: width of the class embedding, which is the U-Net's embed_dim.
        cross_dim: width of the context, which is the U-Net's cross_dim.
        num_image_tokens: the number of context tokens made from the image embedding.

    Example:
        >>> projection = ConditionProjection(8, 6, 5, embed_dim=4, cross_dim=3, num_image_tokens=2)
        >>> caption = Caption(torch.randn(1, 6), torch.randn(1, 7, 5), torch.ones(1, 7, dtype=torch.bool))
        >>> keep = torch.tensor([True])
        >>> context, mask, classes = projection(torch.randn(1, 8), caption, keep, keep)
        >>> context.shape, mask.shape, classes.shape
        (torch.Size([1, 9, 3]), torch.Size([1, 9]), torch.Size([1, 4]))
    """

    def __init__(
        self,
        image_embed_dim: int,
        text_embed_dim: int,
        text_encoding_dim: int,
        embed_dim: int,
        cross_dim: int,
        num_image_tokens: int,
    ):
        super().__init__()
        self.num_image_tokens = num_image_tokens
        self.null_image_embed = nn.Parameter(torch.randn(image_embed_dim))
        self.image_to_time = nn.Linear(image_embed_dim, embed_dim)
        self.image_to_tokens = nn.Linear(image_embed_dim, num_image_tokens * cross_dim)
        self.text_to_time = nn.Linear(text_embed_dim, embed_dim)
        self.text_to_context = nn.Linear(text_encoding_dim, cross_dim)
        self.text_norm = nn.LayerNorm(cross_dim)

    def forward(
        self,
        image_embed: Tensor,  # [B, image_embed_dim]
        caption: Caption,
        keep_image: Tensor,  # bool [B]
        keep_text: Tensor,  # bool [B]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project the conditions; where keep_image or keep_text is False a condition is dropped.

        Returns:
            The context [B, S, cross_dim], its mask bool [B, S] and the class embedding [B, embed_dim].
        """
        image_embed = torch.where(keep_image[:, None], image_embed, self.null_image_embed)
        # torch.where and not a product, because a product would keep the NaN of a dropped row.
        text_embed = torch.where(keep_text[:, None], caption.embed, 0.0)
        encodings = torch.where(keep_text[:, None, None], caption.encodings, 0.0)
        first = torch.arange(encodings.shape[1], device=encodings.device) == 0
        text_mask = caption.mask & keep_text[:, None] | first & ~keep_text[:, None]

        classes = self.image_to_time(image_embed) + self.text_to_time(text_embed)
        width = self.text_norm.normalized_shape[0]  # -1 is undefined for 0 tokens
        tokens = self.image_to_tokens(image_embed).unflatten(1, (self.num_image_tokens, width))
        context = torch.cat([tokens, self.text_norm(self.text_to_context(encodings))], dim=1)
        return context, F.pad(text_mask, (self.num_image_tokens, 0), value=True), classes
