"""The decoder of unCLIP: image embedding and caption -> image, by diffusion.

    class embedding = W_z z + W_t z_t,   context = [W_tokens z (4 tokens), LayerNorm(W_y encodings)]

Source: unCLIP, arXiv 2204.06125, section 2.1; learned variance: Nichol & Dhariwal 2021, arXiv 2102.09672. The
defaults are Karlo's: 893,318,086 parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.process import GaussianDiffusion
from ..diffusion.schedules import make_schedule
from .conditioning import Caption, ConditionProjection
from .inputs import cat_padded, check_images, check_probability, coin, resolve_seeds
from .transformer import TextTransformer
from .unet import UNet

if TYPE_CHECKING:
    from .clip import CLIP


class Decoder(nn.Module):
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
    """

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
    ):
        super().__init__()
        unet = UNet(**unet) if isinstance(unet, dict) else UNet() if unet is None else unet
        text_encoder = TextTransformer(**text_encoder) if isinstance(text_encoder, dict) else text_encoder
        if unet.cross_dim is None or unet.class_embed_dim is not None:
            raise ValueError(
                "unet: expected one with a cross_dim and class_embed_dim=None (the decoder projects), got "
                f"cross_dim={unet.cross_dim}, class_embed_dim={unet.class_embed_dim}"
            )
        _check_channels(unet, variance)
        if image_size % unet.size_multiple:
            raise ValueError(
                f"image_size: expected a multiple of the unet's {unet.size_multiple}, got {image_size}"
            )
        check_probability("image_cond_drop_prob", image_cond_drop_prob)
        check_probability("text_cond_drop_prob", text_cond_drop_prob)
        if num_image_tokens < 0:
            raise ValueError(f"num_image_tokens: expected at least 0, got {num_image_tokens}")

        latent = clip.dim_latent if clip is not None else 768
        own = None if text_encoder is None else text_encoder.config["dim"]
        self.image_embed_dim = latent if image_embed_dim is None else image_embed_dim
        self.text_embed_dim = text_embed_dim or own or latent
        self.text_encoding_dim = (
            text_encoding_dim or own or (clip.config["dim_text"] if clip is not None else 768)
        )
        if own is not None and (self.text_embed_dim, self.text_encoding_dim) != (own, own):
            raise ValueError(
                f"text_embed_dim, text_encoding_dim: expected the text_encoder's {own}, got "
                f"{text_embed_dim}, {text_encoding_dim}"
            )
        self.config = dict(
            unet=unet.config,
            image_size=image_size,
            image_embed_dim=self.image_embed_dim,
            text_embed_dim=self.text_embed_dim,
            text_encoding_dim=self.text_encoding_dim,
            num_image_tokens=num_image_tokens,
            text_encoder=None if text_encoder is None else text_encoder.config,
            image_cond_drop_prob=image_cond_drop_prob,
            text_cond_drop_prob=text_cond_drop_prob,
            unit_norm=unit_norm,
            embed_scale=embed_scale,
            schedule=schedule,
            timesteps=timesteps,
            prediction=prediction,
            variance=variance,
            weighting=weighting,
            min_snr_gamma=min_snr_gamma,
            log_snr_focus=None if log_snr_focus is None else list(log_snr_focus),
            vlb_weight=vlb_weight,
            max_weight=max_weight,
            stratified=stratified,
            sample_timesteps=sample_timesteps,
        )
        self.image_size, self.channels = image_size, unet.in_channels
        self.image_cond_drop_prob, self.text_cond_drop_prob = image_cond_drop_prob, text_cond_drop_prob
        self.unit_norm, self.embed_scale, self.sample_timesteps = unit_norm, embed_scale, sample_timesteps
        self.unet = unet
        self.text_encoder = text_encoder
        self.text_proj = ConditionProjection(
            self.image_embed_dim,
            self.text_embed_dim,
            self.text_encoding_dim,
            unet.embed_dim,
            unet.cross_dim,
            num_image_tokens,
        )
        options = {} if vlb_weight is None else {"vlb_weight": vlb_weight}
        self.diffusion = GaussianDiffusion(
            make_schedule(**schedule) if isinstance(schedule, dict) else make_schedule(schedule, timesteps),
            prediction=prediction,
            variance=variance,
            weighting=weighting,
            min_snr_gamma=min_snr_gamma,
            log_snr_focus=None if log_snr_focus is None else tuple(log_snr_focus),
            max_weight=max_weight,
            stratified=stratified,
            **options,
        )
        # In a tuple, so that it is not a submodule: its weights are in the checkpoint already, under "clip.".
        self._clip = (clip.eval() if clip is not None else None,)

    @property
    def clip(self) -> CLIP | None:
        return self._clip[0]

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
            image_embed = self._embed_image(image)
        caption = self._caption(batch, text, text_encodings, text_mask, text_embed)
        if caption is None and self.text_cond_drop_prob < 1.0:
            raise ValueError(
                "text: expected token ids or text_encodings (or a decoder with text_cond_drop_prob=1), "
                "got neither"
            )
        keep_image = ~coin(batch, self.image_cond_drop_prob, device, generator)
        keep_text = ~coin(batch, self.text_cond_drop_prob, device, generator)
        context, mask, classes = self._condition(batch, image_embed, caption, keep_image, keep_text)
        losses = self.diffusion.training_loss(
            lambda x, t: self.unet(x, t, context, classes, mask),
            image * 2 - 1,
            generator=generator,
            pixel_weight=pixel_weight,
        )
        return losses.mean()

    # -- sampling --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        image_embed: Tensor | None = None,  # [B, image_embed_dim]; None = unconditional on it
        text: Tensor | None = None,  # int64 [B, L]; None = unconditional on it
        *,
        text_encodings: Tensor | None = None,  # [B, L, text_encoding_dim], instead of text
        text_mask: Tensor | None = None,  # bool [B, L]
        text_embed: Tensor | None = None,  # [B, text_embed_dim], beside text_encodings
        negative: Tensor | tuple | None = None,  # int64 [1 or B, L], or (embed, encodings, mask)
        seeds: Tensor | None = None,  # int64 [B]
        generator: torch.Generator | None = None,
        steps: int | None = None,
        cond_scale: float | Tensor = 1.0,
        guidance: float | Tensor | None = None,
        sampler: str = "ddpm",
        size: int | tuple[int, int] | None = None,
        batch_size: int | None = None,
        progress: Callable | bool | None = None,
        **sampler_options,
    ) -> Tensor:
        """Images [B, C, H, W] float32 in [0, 1].

        seeds: one int64 an image, the same seed giving the same picture in any batch; None draws them from
        `generator`, or from torch's own. guidance (= cond_scale, DALLE2-pytorch's name): 1 is none, a number
        or [B]; conditional and fully unconditional rows go through the U-Net as one batch. negative: a
        caption for the unconditional rows, as tokens or as CLIP.encode_text returns it: that of "" for
        weights that were trained with it where the caption was dropped (Karlo's). size: image_size
        by default. batch_size: needed only when both conditions are left out. Further keywords (eta,
        guidance_rescale, clip, dynamic_threshold, x_T, start, callback) go to GaussianDiffusion.sample.
        """
        given = next((x for x in (image_embed, text, text_encodings) if x is not None), None)
        if given is None and batch_size is None:
            raise ValueError("image_embed, text: expected at least one of them, or a batch_size, got none")
        batch = batch_size if batch_size is not None else len(given)
        weight = self.unet.conv_in.weight
        device = weight.device
        caption = self._caption(batch, text, text_encodings, text_mask, text_embed)
        seeds = resolve_seeds(seeds, batch, device, generator)
        guidance = cond_scale if guidance is None else guidance
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
            if guidance is not None:
                x, t = torch.cat([x, x]), torch.cat([t, t])
            return self.unet(x, t, cache, classes)

        height, width = (
            (self.image_size,) * 2 if size is None else (size, size) if isinstance(size, int) else size
        )
        images = self.diffusion.sample(
            denoise,
            (batch, self.channels, height, width),
            seeds=seeds,
            guidance=guidance,
            sampler=sampler,
            steps=self.sample_timesteps if steps is None else steps,
            progress=progress,
            device=device,
            # Small steps in bfloat16 would drown in rounding: the state stays in float32.
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            **sampler_options,
        )
        return ((images + 1) / 2).clamp(0, 1)

    # -- conditions ------------------------------------------------------------------------------------------

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


def _check_channels(unet: UNet, variance: str) -> None:
    expected = unet.in_channels * (2 if variance == "learned_range" else 1)
    if unet.out_channels != expected:
        raise ValueError(
            f"unet: expected out_channels = {expected} for variance={variance!r}, got {unet.out_channels}"
        )
