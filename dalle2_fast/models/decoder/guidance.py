"""A decoder's U-Net with its conditions filled in, and the unconditional rows that guidance needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dalle2_fast.diffusion.graphs.plan import ConditionedNet
from dalle2_fast.models.captions import Caption, cat_padded
from dalle2_fast.models.decoder.encoding import encode_negative
from dalle2_fast.models.distilled import check_no_unconditional_rows
from dalle2_fast.models.inputs import check_features
from dalle2_fast.models.unet.context import ContextCache

if TYPE_CHECKING:
    from dalle2_fast.models.decoder.model import Decoder
    from dalle2_fast.models.unet.model import UNet


def condition(
    decoder: Decoder,
    batch: int,
    image_embed: Tensor | None,  # [B, E]
    caption: Caption | None,
    keep_image: Tensor,  # bool [B]
    keep_text: Tensor,  # bool [B]
) -> tuple[Tensor, Tensor, Tensor]:
    """Project the conditions of a batch; a condition that is None counts as dropped in every row.

    Args:
        decoder: its projections are used.
        batch: the number of rows.
        image_embed: image embeddings, or None.
        caption: encoded captions (see `encode_captions`), or None.
        keep_image: False where the image embedding is dropped.
        keep_text: False where the caption is dropped.

    Returns:
        The context [B, S, cross_dim], its mask bool [B, S] and the class embedding [B, embed_dim].

    Raises:
        TypeError, ValueError: image_embed has the wrong dtype or shape.
    """
    weight = decoder.text_proj.image_to_time.weight
    if image_embed is None:
        image_embed = weight.new_zeros(batch, decoder.image_embed_dim)
        keep_image = torch.zeros_like(keep_image)
    else:
        check_features("image_embed", image_embed, "B, E", (batch, decoder.image_embed_dim))
        image_embed = decoder.scale_embedding(image_embed).to(weight.dtype)
    if caption is None:
        caption = Caption(
            weight.new_zeros(batch, decoder.text_embed_dim),
            weight.new_zeros(batch, 1, decoder.text_encoding_dim),
            torch.ones(batch, 1, dtype=torch.bool, device=weight.device),
        )
        keep_text = torch.zeros_like(keep_text)
    return decoder.text_proj(image_embed, caption, keep_image, keep_text)


class GuidedDenoiser(NamedTuple):
    """What `GaussianDiffusion.sample` needs of a conditioned U-Net.

    Args:
        net: with guidance it returns 2B rows, first the conditional ones; else it is conditional_net.
        conditional_net: returns the B conditional rows.
        guidance: guidance weight, a number or [B]; None if net returns no unconditional rows.
    """

    net: ConditionedNet
    conditional_net: ConditionedNet
    guidance: float | Tensor | None


def guided_denoiser(
    decoder: Decoder,
    batch: int,
    image_embed: Tensor | None,  # [B, E]
    caption: Caption | None,
    guidance: float | Tensor | None,
    negative: Tensor | tuple | None = None,
    extra: Tensor | None = None,  # [B, C', H, W]
) -> GuidedDenoiser:
    """The U-Net with its conditions, as `GaussianDiffusion.sample` calls it.

    Args:
        decoder: the decoder.
        batch: the number of rows.
        image_embed: image embeddings, or None.
        caption: encoded captions, or None.
        guidance: guidance weight, a number or [B]; 1 is no guidance.
        negative: captions of the unconditional rows, see `encode_negative`.
        extra: input channels in addition to x.

    Returns:
        Two functions of (x, t), and the guidance to sample with: None if the decoder takes it as an input.

    Raises:
        ValueError: the decoder takes guidance as an input, and not this weight or no negative captions.
    """
    device = decoder.unet.conv_in.weight.device
    weights = None
    if decoder.guidance_input is not None:
        check_no_unconditional_rows(decoder.part, negative=negative)
        weights = decoder.guidance_input.weights(
            decoder.part, 1.0 if guidance is None else guidance, batch, device
        )
        guidance = None
    elif not isinstance(guidance, Tensor) and guidance == 1.0:
        guidance = None
    keep_image = torch.full((batch,), image_embed is not None, device=device)
    keep_text = torch.full((batch,), caption is not None, device=device)
    context, mask, classes = condition(decoder, batch, image_embed, caption, keep_image, keep_text)
    if weights is not None:
        classes = classes + decoder.guidance_input(weights)
    if guidance is not None:
        nothing = torch.zeros_like(keep_image)
        other = encode_negative(decoder, batch, negative)
        without = condition(decoder, batch, image_embed, other, nothing, ~nothing)
        context, mask, classes = (
            cat_padded(*pair) for pair in zip((context, mask, classes), without, strict=True)
        )
    cache = decoder.unet.encode_context(context, mask)  # the same in every step

    def net(rows: int) -> ConditionedNet:
        first = cache.first(rows)
        conditions = first.keys, first.values, first.mask, classes[:rows], extra
        return ConditionedNet(_denoise, (decoder.unet,), conditions)

    conditional_net = net(batch)
    guided_net = conditional_net if guidance is None else net(2 * batch)
    return GuidedDenoiser(guided_net, conditional_net, guidance)


def _denoise(
    unet: UNet,
    x: Tensor,  # [B, C, H, W]
    t: Tensor,  # [B]
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    mask: Tensor | None,
    classes: Tensor,  # [B or 2B, embed_dim]
    extra: Tensor | None,  # [B, C', H, W]
) -> Tensor:
    """The U-Net's output for each row of the conditions: with twice as many rows x counts twice."""
    has_both = len(classes) > len(x)
    x = x if extra is None else torch.cat([x, extra.to(x.dtype)], dim=1)
    if has_both:
        x, t = torch.cat([x, x]), torch.cat([t, t])
    return unet(x, t, ContextCache(keys, values, mask), classes)
