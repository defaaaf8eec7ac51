"""The decoder of unCLIP: image embedding and caption -> image, by diffusion.

    prediction = unet(x_t, t, context, classes),   context, classes = projections(image embedding, caption)

Source: Ramesh et al., "unCLIP", 2204.06125, section 2.1.
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
from dalle2_fast.models.distilled import GuidanceInput, check_consistency_steps, weight_range
from dalle2_fast.models.inputs import bernoulli, check_probability
from dalle2_fast.models.transformer import TextTransformer
from dalle2_fast.models.unet.model import UNet

if TYPE_CHECKING:
    from dalle2_fast.models.clip.model import CLIP


class Decoder(ClipConditioned):
    """Image embedding and caption -> image [B, C, image_size, image_size], by diffusion.

    The defaults are Karlo's decoder with 893,318,086 parameters.

    Args:
        unet: a UNet, or a dict of its arguments; None builds the default.
        clip: embeds and encodes what is not given encoded. It is frozen (set to evaluation mode, used without
            gradients), and is not trained, moved or saved with the decoder.
        image_size: side of the images in pixels.
        image_embed_dim: width of the image embedding; None takes it from `clip`, or 768.
        text_embed_dim: width of a caption's one vector; None takes it from `text_encoder` or `clip`, or 768.
        text_encoding_dim: width of a caption's token encodings; None as for text_embed_dim.
        num_image_tokens: the number of context tokens made from the image embedding.
        text_encoder: a TextTransformer, or a dict of its arguments, that is trained with the decoder. A
            caption's one vector is then the encoding of its last token. None: captions are encoded by `clip`,
            or given encoded.
        image_cond_drop_prob: probability with which training drops the image embedding.
        text_cond_drop_prob: probability with which training drops the caption, independently.
        unit_norm: whether embeddings of CLIP are L2-normalised first; False for weights that were trained on
            raw projections (Karlo's).
        embed_scale: factor on embeddings of CLIP, which gives their entries about unit size; None is
            sqrt(width); 1 for raw projections.
        schedule: the name of a noise schedule, or a dict of arguments of `make_schedule`.
        timesteps: the number of discrete times of a schedule that is given by name.
        prediction: what the U-Net predicts, see `GaussianDiffusion` for this and the next eight options.
        variance: variance of the noise of DDPM; "learned_range" needs a U-Net with twice as many output
            channels.
        weighting: weighting of the loss over time.
        min_snr_gamma: gamma of the weighting "min_snr".
        log_snr_focus: range of log-SNR from which a fraction of the training times is drawn.
        vlb_weight: weight of the variational bound; None is the default of `GaussianDiffusion`.
        max_weight: upper bound on the weights of the loss.
        stratified: whether training times are stratified.
        sigma_data: standard deviation of the data, for the prediction "edm".
        sample_timesteps: the default number of steps of `sample`.
        inpaint: whether the U-Net also receives the kept part of the image and the mask (1 = repaint), as
            C + 1 more input channels (a dict with in_channels = C is widened), and trains on random masks;
            GLIDE, 2112.10741, section 3.3. `for_inpainting` makes such a decoder from a trained one.
        guidance_input: the smallest and the largest guidance weight of a network that takes the weight as an
            input, see `GuidanceInput`, and so samples with B rows in place of 2 B. None: guidance takes
            unconditional rows.
        consistency_steps: the number of steps for which the network was distilled: it then has the sampler
            "consistency" alone, with this number of steps or a divisor of it. None: not distilled.

    Raises:
        TypeError, ValueError: an option has the wrong type or value, or sizes do not fit each other.

    Source: Ramesh et al., "unCLIP", 2204.06125, section 2.1; Nichol and Dhariwal, 2102.09672, for the learned
    variance.

    Example:
        >>> unet = dict(in_channels=3, out_channels=3, channels=(8, 16), layers_per_block=1, num_groups=4,
        ...             attention_levels=(1,), head_dim=8, cross_dim=6)
        >>> decoder = Decoder(unet, image_size=8, image_embed_dim=4, text_embed_dim=4, text_encoding_dim=5,
        ...                   variance="fixed_small", text_cond_drop_prob=1.0)
        >>> image_embed = torch.randn(2, 4)
        >>> decoder(torch.rand(2, 3, 8, 8), image_embed=image_embed).shape
        torch.Size([])
        >>> decoder.sample(image_embed, seeds=torch.tensor([0, 1]), steps=2).shape
        torch.Size([2, 3, 8, 8])
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
        sigma_data: float = 0.5,
        sample_timesteps: int = 25,
        inpaint: bool = False,
        guidance_input: Sequence[float] | None = None,
        consistency_steps: int | None = None,
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
            max_weight=max_weight, stratified=stratified, sigma_data=sigma_data,
            sample_timesteps=sample_timesteps, inpaint=inpaint,
            guidance_input=weight_range("guidance_input", guidance_input),
            consistency_steps=check_consistency_steps(consistency_steps),
        )
        self.image_size, self.inpaint = image_size, inpaint
        self.channels = (unet.in_channels - 1) // 2 if inpaint else unet.in_channels
        self.image_cond_drop_prob, self.text_cond_drop_prob = image_cond_drop_prob, text_cond_drop_prob
        self.sample_timesteps, self.consistency_steps = sample_timesteps, consistency_steps
        self.unet = unet
        self.text_encoder = text_encoder
        self.text_proj = ConditionProjection(
            self.image_embed_dim, self.text_embed_dim, self.text_encoding_dim, unet.embed_dim, unet.cross_dim,
            num_image_tokens,
        )
        if guidance_input is not None:
            self.guidance_input = GuidanceInput(unet.embed_dim, guidance_input)
        self.diffusion = diffusion_of(self.config)

    # -- training --------------------------------------------------------------------------------------------

    def forward(
        self,
        image: Tensor,  # [B, C, image_size, image_size] in [0, 1]
        text: Tensor | None = None,  # int64 [B, L]
        image_embed: Tensor | None = None,  # [B, image_embed_dim]
        *,
        text_encodings: Tensor | None = None,  # [B, L, text_encoding_dim]
        text_mask: Tensor | None = None,  # bool [B, L], True = a token
        text_embed: Tensor | None = None,  # [B, text_embed_dim]
        generator: torch.Generator | None = None,
        pixel_weight: Tensor | None = None,  # [B, 1, H, W]
        mask: Tensor | None = None,  # [B, 1, H, W], 1 = repaint
        check_range: bool = True,
    ) -> Tensor:
        """The training loss, a scalar, with each condition dropped at random.

        A condition may only be absent if training always drops it (its drop probability is 1).

        Args:
            image: the images.
            text: token ids of the captions, which the text_encoder or `clip` encodes.
            image_embed: CLIP embeddings of the images; None computes them with `clip`.
            text_encodings: encodings of the captions, in place of `text`.
            text_mask: which positions of text_encodings are tokens; None for all.
            text_embed: one vector per caption, with text_encodings.
            generator: source of the random numbers; None is torch's default generator.
            pixel_weight: factor on the squared error of each pixel.
            mask: with inpaint=True the masks to train on; None draws them with `draw_masks`.
            check_range: whether the values of the images are checked; on a GPU the host has to wait for this.

        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape or values, or is missing.
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

    # -- sampling: free functions of a decoder, which are also its methods -----------------------------------

    sample = sampling.sample
    invert = sampling.invert

    @classmethod
    def for_inpainting(cls, decoder: Decoder) -> Decoder:
        """A copy of `decoder` with inpaint=True.

        The weights of the new input channels are zero, so that the copy samples as before until it is
        trained.

        Raises:
            ValueError: the decoder already has inpaint=True.

        Source: Nichol et al., "GLIDE", 2112.10741, section 3.3.
        """
        return with_inpainting(cls, decoder)
