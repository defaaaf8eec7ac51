"""The decoder of unCLIP: image embedding and caption -> image, by diffusion.

    class embedding = W_z z + W_t z_t,   context = [W_tokens z (4 tokens), LayerNorm(W_y encodings)]

Source: unCLIP, arXiv 2204.06125, section 2.1; learned variance: Nichol & Dhariwal 2021, arXiv 2102.09672. The
defaults are Karlo's: 893,318,086 parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalle2_fast.data.images import check_images
from dalle2_fast.models.clip_conditioned import ClipConditioned
from dalle2_fast.models.decoder import sampling
from dalle2_fast.models.decoder.conditioning import ConditionProjection
from dalle2_fast.models.decoder.encoding import embed_images, encode_captions
from dalle2_fast.models.decoder.guidance import condition
from dalle2_fast.models.decoder.inpainting import (
    check_channels,
    check_inpainting_mask,
    kept_channels,
    widened,
    with_inpainting,
)
from dalle2_fast.models.decoder.masks import draw_masks
from dalle2_fast.models.diffusion_options import diffusion_of
from dalle2_fast.models.inputs import bernoulli, check_probability
from dalle2_fast.models.transformer import TextTransformer
from dalle2_fast.models.unet.model import UNet

if TYPE_CHECKING:
    from dalle2_fast.models.clip.model import CLIP


class Decoder(ClipConditioned):
    """Image embedding and caption -> image [B, C, image_size, image_size].

    unet: a UNet, or its config; None builds the default. clip: encodes what is not given encoded; it is used
        without gradients and stays outside: neither trained, moved nor saved with the decoder.
    image_embed_dim, text_embed_dim, text_encoding_dim: widths of the image embedding, of a caption's one
        vector and of its token encodings; None takes them from text_encoder or clip, or 768.
    num_image_tokens: context tokens made from the image embedding.
    text_encoder: the decoder's own TextTransformer, or its config, trained along; a caption's one vector is
        then the encoding of its last token. None: captions are encoded by clip, or arrive encoded.
    image_cond_drop_prob, text_cond_drop_prob: how often training drops each condition, independently.
    unit_norm: embeddings of CLIP are L2-normalised first (False for weights trained on raw ones: Karlo's);
        embed_scale: then multiplied by this, by default sqrt(width) so that entries have about unit size (1
            for raw).
    schedule, timesteps, prediction, variance, weighting, min_snr_gamma, log_snr_focus, vlb_weight,
        max_weight, stratified: see GaussianDiffusion. schedule is a name, or the arguments of make_schedule;
        variance "learned_range" needs a unet with twice as many output channels.
    sample_timesteps: steps of `sample` by default.
    inpaint: the U-Net also sees the part of the picture that is kept, and the mask (1 = repaint): C + 1 more
        input channels (a config whose in_channels are the C of the picture is widened), trained on random
        masks. GLIDE, 2112.10741, section 3.3. `for_inpainting` makes one of a trained decoder.
    """

    part = "decoder"

    def __init__(
        self,
        unet: UNet | dict | None = None,
        *,
        clip: CLIP | None = None,
        image_size: int = 64,
        image_embed_dim: int | None = None,
        text_embed_dim: int | None = None,
        text_encoding_dim: int | None = None,
        num_image_tokens: int = 4,
        text_encoder: TextTransformer | dict | None = None,
        image_cond_drop_prob: float = 0.1,
        text_cond_drop_prob: float = 0.5,
        unit_norm: bool = True,
        embed_scale: float | None = None,
        schedule: str | dict = "cosine",
        timesteps: int | None = 1000,
        prediction: str = "epsilon",
        variance: str = "learned_range",
        weighting: str = "simple",
        min_snr_gamma: float = 5.0,
        log_snr_focus: Sequence[float] | None = None,
        vlb_weight: float | None = None,
        max_weight: float = 100.0,
        stratified: bool = False,
        sample_timesteps: int = 25,
        inpaint: bool = False,
    ):
        super().__init__(clip, unit_norm, embed_scale)
        if not isinstance(unet, UNet):
            unet = UNet(**(widened(unet or {}, variance) if inpaint else unet or {}))
        text_encoder = TextTransformer(**text_encoder) if isinstance(text_encoder, dict) else text_encoder
        if unet.cross_dim is None or unet.class_embed_dim is not None:
            raise ValueError(
                "unet: expected one with a cross_dim and class_embed_dim=None (the decoder projects), got "
                f"cross_dim={unet.cross_dim}, class_embed_dim={unet.class_embed_dim}"
            )
        check_channels(unet, variance, inpaint)
        if image_size % unet.size_multiple:
            raise ValueError(
                f"image_size: expected a multiple of the unet's {unet.size_multiple}, got {image_size}"
            )
        check_probability("image_cond_drop_prob", image_cond_drop_prob)
        check_probability("text_cond_drop_prob", text_cond_drop_prob)
        if num_image_tokens < 0:
            raise ValueError(f"num_image_tokens: expected at least 0, got {num_image_tokens}")

        latent = clip.dim_latent if clip is not None else 768
        tower = None if text_encoder is None else text_encoder.config["dim"]
        self.image_embed_dim = latent if image_embed_dim is None else image_embed_dim
        self.text_embed_dim = text_embed_dim or tower or latent
        self.text_encoding_dim = (
            text_encoding_dim or tower or (clip.config["dim_text"] if clip is not None else 768)
        )
        if tower is not None and (self.text_embed_dim, self.text_encoding_dim) != (tower, tower):
            raise ValueError(
                f"text_embed_dim, text_encoding_dim: expected the text_encoder's {tower}, got "
                f"{text_embed_dim}, {text_encoding_dim}"
            )
        self.config = dict(
            unet=unet.config, image_size=image_size, image_embed_dim=self.image_embed_dim,
            text_embed_dim=self.text_embed_dim, text_encoding_dim=self.text_encoding_dim,
            num_image_tokens=num_image_tokens,
            text_encoder=None if text_encoder is None else text_encoder.config,
            image_cond_drop_prob=image_cond_drop_prob, text_cond_drop_prob=text_cond_drop_prob,
            unit_norm=unit_norm, embed_scale=embed_scale, schedule=schedule, timesteps=timesteps,
            prediction=prediction, variance=variance, weighting=weighting, min_snr_gamma=min_snr_gamma,
            log_snr_focus=None if log_snr_focus is None else list(log_snr_focus), vlb_weight=vlb_weight,
            max_weight=max_weight, stratified=stratified, sample_timesteps=sample_timesteps, inpaint=inpaint,
        )
        self.image_size, self.inpaint = image_size, inpaint
        self.channels = (unet.in_channels - 1) // 2 if inpaint else unet.in_channels
        self.image_cond_drop_prob, self.text_cond_drop_prob = image_cond_drop_prob, text_cond_drop_prob
        self.sample_timesteps = sample_timesteps
        self.unet = unet
        self.text_encoder = text_encoder
        self.text_proj = ConditionProjection(
            self.image_embed_dim, self.text_embed_dim, self.text_encoding_dim, unet.embed_dim, unet.cross_dim,
            num_image_tokens,
        )
        self.diffusion = diffusion_of(self.config)

    # -- training --------------------------------------------------------------------------------------------

    def forward(
        self,
        image: Tensor,  # [B, C, image_size, image_size] in [0, 1]
        text: Tensor | None = None,  # int64 [B, L]; needs text_encoder or clip
        image_embed: Tensor | None = None,  # [B, image_embed_dim]; None needs clip
        *,
        text_encodings: Tensor | None = None,  # [B, L, text_encoding_dim], instead of text
        text_mask: Tensor | None = None,  # bool [B, L], True = a token
        text_embed: Tensor | None = None,  # [B, text_embed_dim], beside text_encodings
        generator: torch.Generator | None = None,
        pixel_weight: Tensor | None = None,  # [B, 1, H, W], weight of the squared error
        mask: Tensor | None = None,  # [B, 1, H, W], 1 = repaint; with inpaint=True, None draws them
        check_range: bool = True,
    ) -> Tensor:
        """The training loss, a scalar, with each condition dropped at random.

        A condition may be left out only where training drops it always (its drop probability is 1).
        check_range=False skips the look at the image's values, for which the host has to wait for a GPU.
        """
        check_images(
            "image", image, self.channels, (self.image_size, self.image_size), check_range=check_range
        )
        batch, device = len(image), image.device
        if image_embed is None and self.image_cond_drop_prob < 1.0:
            image_embed = embed_images(self, image)
        caption = encode_captions(self, batch, text, text_encodings, text_mask, text_embed)
        if caption is None and self.text_cond_drop_prob < 1.0:
            raise ValueError(
                "text: expected token ids or text_encodings (or a decoder with text_cond_drop_prob=1), "
                "got neither"
            )
        keep_image = ~bernoulli(batch, self.image_cond_drop_prob, device, generator)
        keep_text = ~bernoulli(batch, self.text_cond_drop_prob, device, generator)
        context, context_mask, classes = condition(
            self, batch, image_embed, caption, keep_image, keep_text
        )
        target, extra = image * 2 - 1, None
        if self.inpaint:
            if mask is None:
                mask = draw_masks(batch, *image.shape[2:], device=device, generator=generator)
            extra = kept_channels(target, check_inpainting_mask(mask, image.shape))
        elif mask is not None:
            raise ValueError("mask: expected None, because this decoder has inpaint=False")

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            x = x if extra is None else torch.cat([x, extra.to(x.dtype)], dim=1)
            return self.unet(x, t, context, classes, context_mask)

        losses = self.diffusion.training_loss(
            denoise, target, generator=generator, pixel_weight=pixel_weight
        )
        return losses.mean()

    # -- sampling: free functions of a decoder, which are its methods as well --------------------------------

    sample = sampling.sample
    invert = sampling.invert

    @classmethod
    def for_inpainting(cls, decoder: Decoder) -> Decoder:
        """A copy of `decoder` with inpaint=True. The weights of the new input channels are zero, so it draws
        as before until it is trained (GLIDE, 2112.10741, section 3.3)."""
        return with_inpainting(cls, decoder)
