"""The decoder of unCLIP: image embedding and caption -> image, by diffusion.

    class embedding = W_z z + W_t z_t,   context = [W_tokens z (4 tokens), LayerNorm(W_y encodings)]

Source: unCLIP, arXiv 2204.06125, section 2.1; learned variance: Nichol & Dhariwal 2021, arXiv 2102.09672. The
defaults are Karlo's: 893,318,086 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalle2_fast.checkpoints import Pretrained
from dalle2_fast.data.images import check_images
from dalle2_fast.diffusion.inpainting import check_mask
from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.schedules import make_schedule
from dalle2_fast.models.decoder.base import ConditionedDecoder
from dalle2_fast.models.decoder.conditioning import ConditionProjection
from dalle2_fast.models.decoder.masks import draw_masks
from dalle2_fast.models.inputs import check_probability, coin, resolve_seeds
from dalle2_fast.models.transformer import TextTransformer
from dalle2_fast.models.unet.model import UNet

if TYPE_CHECKING:
    from dalle2_fast.models.clip.model import CLIP


class Decoder(Pretrained, ConditionedDecoder):
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
        super().__init__(clip)
        if not isinstance(unet, UNet):
            unet = UNet(**(_widened(unet or {}, variance) if inpaint else unet or {}))
        text_encoder = TextTransformer(**text_encoder) if isinstance(text_encoder, dict) else text_encoder
        if unet.cross_dim is None or unet.class_embed_dim is not None:
            raise ValueError(
                "unet: expected one with a cross_dim and class_embed_dim=None (the decoder projects), got "
                f"cross_dim={unet.cross_dim}, class_embed_dim={unet.class_embed_dim}"
            )
        _check_channels(unet, variance, inpaint)
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
            inpaint=inpaint,
        )
        self.image_size, self.inpaint = image_size, inpaint
        self.channels = (unet.in_channels - 1) // 2 if inpaint else unet.in_channels
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
            image_embed = self._embed_image(image)
        caption = self._caption(batch, text, text_encodings, text_mask, text_embed)
        if caption is None and self.text_cond_drop_prob < 1.0:
            raise ValueError(
                "text: expected token ids or text_encodings (or a decoder with text_cond_drop_prob=1), "
                "got neither"
            )
        keep_image = ~coin(batch, self.image_cond_drop_prob, device, generator)
        keep_text = ~coin(batch, self.text_cond_drop_prob, device, generator)
        context, context_mask, classes = self._condition(batch, image_embed, caption, keep_image, keep_text)
        target, extra = image * 2 - 1, None
        if self.inpaint:
            if mask is None:
                mask = draw_masks(batch, *image.shape[2:], device=device, generator=generator)
            extra = self._kept(target, self._mask(mask, image.shape))
        elif mask is not None:
            raise ValueError("mask: expected None, because this decoder has inpaint=False")

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            x = x if extra is None else torch.cat([x, extra.to(x.dtype)], dim=1)
            return self.unet(x, t, context, classes, context_mask)

        losses = self.diffusion.training_loss(
            denoise, target, generator=generator, pixel_weight=pixel_weight
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
        image: Tensor | None = None,  # [B, C, H, W] in [0, 1], to keep where mask is 0
        mask: Tensor | None = None,  # [1 or B, 1, H, W], 1 = repaint
        init_image: Tensor | None = None,  # [B, C, H, W] in [0, 1]
        strength: float | None = None,
        progress: Callable | bool | None = None,
        **sampler_options,
    ) -> Tensor:
        """Images [B, C, H, W] float32 in [0, 1].

        seeds: one int64 an image, the same seed giving the same picture in any batch; None draws them from
        `generator`, or from torch's own. guidance (= cond_scale, DALLE2-pytorch's name): 1 is none, a number
        or [B]; conditional and fully unconditional rows go through the U-Net as one batch. negative: a
        caption for the unconditional rows, as tokens or as CLIP.encode_text returns it: that of "" for
        weights that were trained with it where the caption was dropped (Karlo's). size: image_size
        by default. batch_size: needed only when both conditions are left out.

        image, mask: inpainting by any decoder: the image is kept, exactly, where the mask is 0, by putting
        it, noised, into every step; one with inpaint=True sees it besides. init_image, strength: start from
        this image, noised, and make only the last `strength` in (0, 1] of the steps (SDEdit, 2108.01073); 1
        is all of them and forgets the image. Further keywords (eta, guidance_rescale, clip,
        dynamic_threshold, spacing, x_T, start, resample, jump, callback) go to GaussianDiffusion.sample.
        """
        given = next((x for x in (image_embed, text, text_encodings) if x is not None), None)
        if given is None and batch_size is None:
            raise ValueError("image_embed, text: expected at least one of them, or a batch_size, got none")
        batch = batch_size if batch_size is not None else len(given)
        weight = self.unet.conv_in.weight
        device = weight.device
        caption = self._caption(batch, text, text_encodings, text_mask, text_embed)
        seeds = resolve_seeds(seeds, batch, device, generator)
        height, width = (
            (self.image_size,) * 2 if size is None else (size, size) if isinstance(size, int) else size
        )
        shape = (batch, self.channels, height, width)
        # Small steps in bfloat16 would drown in rounding: the state stays in float32.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        steps = self.sample_timesteps if steps is None else steps
        if (image is None) != (mask is None):
            raise ValueError("image, mask: expected both or neither")
        if mask is not None:
            check_images("image", image, self.channels, (height, width), batch)
            mask = self._mask(mask, shape).to(device)
            sampler_options |= dict(known=image.to(device, dtype) * 2 - 1, mask=mask)
        if (init_image is None) != (strength is None):
            raise ValueError("init_image, strength: expected both or neither")
        if init_image is not None:
            check_images("init_image", init_image, self.channels, (height, width), batch)
            sampler_options |= self._start(init_image.to(device, dtype) * 2 - 1, strength, steps, seeds,
                                           sampler_options.get("spacing", "time"))  # fmt: skip
        denoise, guidance = self._conditioned(
            batch, image_embed, caption, cond_scale if guidance is None else guidance, negative,
            self._kept(sampler_options.get("known"), mask, shape) if self.inpaint else None,
        )  # fmt: skip
        images = self.diffusion.sample(
            denoise,
            shape,
            seeds=seeds,
            guidance=guidance,
            sampler=sampler,
            steps=steps,
            progress=progress,
            device=device,
            dtype=dtype,
            **sampler_options,
        )
        images = ((images + 1) / 2).clamp(0, 1)
        return images if mask is None else torch.where(mask, images, image.to(images))

    @torch.no_grad()
    def invert(
        self,
        image: Tensor,  # [B, C, H, W] in [0, 1]
        image_embed: Tensor | None = None,  # [B, image_embed_dim]; None = unconditional on it
        text: Tensor | None = None,  # int64 [B, L]; None = unconditional on it
        *,
        text_encodings: Tensor | None = None,  # [B, L, text_encoding_dim], instead of text
        text_mask: Tensor | None = None,  # bool [B, L]
        text_embed: Tensor | None = None,  # [B, text_embed_dim], beside text_encodings
        negative: Tensor | tuple | None = None,  # as in sample
        steps: int = 50,
        cond_scale: float | Tensor = 1.0,
        progress: Callable | bool | None = None,
        **options,
    ) -> Tensor:
        """The noise x_T [B, C, H, W], float32, from which `sample(x_T=..., sampler="ddim")` with the same
        conditions, steps and guidance draws about this image. refine, clip: see GaussianDiffusion.invert."""
        check_images("image", image, self.channels)
        weight = self.unet.conv_in.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        x0 = image.to(weight.device, dtype) * 2 - 1
        caption = self._caption(len(x0), text, text_encodings, text_mask, text_embed)
        extra = self._kept(None, None, x0.shape) if self.inpaint else None
        denoise, guidance = self._conditioned(len(x0), image_embed, caption, cond_scale, negative, extra)
        options |= dict(guidance=guidance, progress=progress)
        return self.diffusion.invert(denoise, x0, steps=steps, **options)

    # -- inpainting and starting images ----------------------------------------------------------------------

    @classmethod
    def for_inpainting(cls, decoder: Decoder) -> Decoder:
        """A copy of `decoder` with inpaint=True. The weights of the new input channels are zero, so it draws
        as before until it is trained (GLIDE, 2112.10741, section 3.3)."""
        if decoder.inpaint:
            raise ValueError("decoder: expected one with inpaint=False, got inpaint=True")
        with torch.random.fork_rng(devices=[]):  # the constructor draws initial weights
            wider = cls(**decoder.config | {"inpaint": True}, clip=decoder.clip)
        kept, ours = decoder.channels, wider.state_dict()
        for name, old in decoder.state_dict().items():
            if old.shape != ours[name].shape:  # a first convolution: [x, new channels, whatever follows]
                cells = old.new_zeros(ours[name].shape)
                patch = wider.unet.patch_size if name == "unet.conv_in.weight" else wider.unet.fine.patch_size
                head, added = kept * patch**2, (kept + 1) * patch**2
                cells[:, :head], cells[:, head + added :] = old[:, :head], old[:, head:]
                old = cells
            ours[name] = old
        wider.load_state_dict(ours)
        return wider.to(decoder.unet.conv_in.weight).train(decoder.training)

    @staticmethod
    def _mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
        mask = check_mask(mask, tuple(shape))
        if mask.shape[1] != 1:
            raise ValueError(f"mask: expected [1 or B, 1, H, W], got {tuple(mask.shape)}")
        return mask.expand(-1, -1, *shape[2:])

    def _kept(self, known: Tensor | None, mask: Tensor | None, shape: Sequence[int] = ()) -> Tensor:
        """The C + 1 channels that an inpainting U-Net sees: what is kept, 0 elsewhere, and the mask."""
        weight = self.unet.conv_in.weight
        if known is None:  # nothing is kept
            extra = weight.new_zeros(shape[0], self.channels + 1, *shape[2:])
            extra[:, -1] = 1
            return extra
        mask = mask.to(known.device).expand(len(known), -1, -1, -1)
        return torch.cat([known.masked_fill(mask, 0.0), mask.to(known.dtype)], dim=1)

    def _start(self, x0: Tensor, strength: float, steps: int, seeds: Tensor, spacing: str) -> dict:
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
            raise ValueError(f"strength: expected a number in (0, 1], got {strength!r}")
        start = steps - max(1, round(strength * steps))
        if start == 0:  # all steps, from noise alone
            return {}
        time = self.diffusion.times(steps, spacing)[start]
        return dict(x_T=self.diffusion.add_noise(x0, time.expand(len(x0)), seeds=seeds), start=start)


def _widened(unet: dict, variance: str) -> dict:
    """A U-Net's config with the channels of inpainting, unless it has them already."""
    channels = unet.get("in_channels", 3)
    out = unet.get("out_channels", 6) // (2 if variance == "learned_range" else 1)
    return unet | {"in_channels": 2 * channels + 1} if channels == out else unet


def _check_channels(unet: UNet, variance: str, inpaint: bool) -> None:
    factor = 2 if variance == "learned_range" else 1
    if inpaint:
        expected = 2 * (unet.out_channels // factor) + 1
        if unet.in_channels != expected or unet.out_channels % factor:
            raise ValueError(
                f"unet: expected in_channels = 2 C + 1 = {expected} for inpaint=True and out_channels = "
                f"{unet.out_channels}, got {unet.in_channels}"
            )
    elif unet.out_channels != unet.in_channels * factor:
        raise ValueError(
            f"unet: expected out_channels = {unet.in_channels * factor} for variance={variance!r}, got "
            f"{unet.out_channels}"
        )
