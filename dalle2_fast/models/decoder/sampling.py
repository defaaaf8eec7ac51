"""Sampling from a decoder: images from conditions, edited images, and the noise that an image came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle2_fast.data.images import check_images
from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.progress import Progress
from dalle2_fast.diffusion.sampler_tables import spacing_of
from dalle2_fast.models.decoder.encoding import encode_captions
from dalle2_fast.models.decoder.guidance import guided_denoiser
from dalle2_fast.models.decoder.inpainting import check_inpainting_mask, kept_channels, nothing_kept
from dalle2_fast.models.distilled import check_no_unconditional_rows, resolve_sampler
from dalle2_fast.models.inputs import resolve_seeds
from dalle2_fast.ops._dtypes import compute_dtype

if TYPE_CHECKING:
    from dalle2_fast.models.decoder.model import Decoder


@torch.no_grad()
def sample(
    decoder: Decoder,
    image_embed: Tensor | None = None,  # [B, image_embed_dim]
    text: Tensor | None = None,  # int64 [B, L]
    *,
    text_encodings: Tensor | None = None,  # [B, L, text_encoding_dim]
    text_mask: Tensor | None = None,  # bool [B, L], True = a token
    text_embed: Tensor | None = None,  # [B, text_embed_dim]
    negative: Tensor | tuple | None = None,  # int64 [1 or B, L], or (embed, encodings, mask)
    seeds: Tensor | None = None,  # int64 [B]
    generator: torch.Generator | None = None,
    steps: int | None = None,
    cond_scale: float | Tensor = 1.0,
    guidance: float | Tensor | None = None,
    guidance_interval: Sequence[float] | None = None,  # (low, high) in log-SNR
    sampler: str | None = None,
    size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    image: Tensor | None = None,  # [B, C, H, W] in [0, 1]
    mask: Tensor | None = None,  # [1 or B, 1, H, W], 1 = repaint
    init_image: Tensor | None = None,  # [B, C, H, W] in [0, 1]
    strength: float | None = None,
    progress: Progress = None,
    **sampler_options: Any,
) -> Tensor:
    """Sample images.

    Conditional and unconditional rows go through the U-Net as one batch; steps without guidance have only the
    conditional rows.

    Args:
        decoder: the decoder.
        image_embed: CLIP image embeddings; None samples without them.
        text: token ids of the captions; None samples without captions, or with text_encodings.
        text_encodings: encodings of the captions, in place of `text`.
        text_mask: which positions of text_encodings are tokens; None for all.
        text_embed: one vector per caption, with text_encodings.
        negative: a caption for the unconditional rows, as token ids or as the tuple that CLIP.encode_text
            returns: that of "" for weights that were trained with it where the caption was dropped (Karlo's).
        seeds: one per image; the same seed gives the same image in any batch. None draws them from
            `generator`.
        generator: source of the seeds; None is torch's default generator.
        steps: the number of steps; None is sample_timesteps.
        cond_scale: DALLE2-pytorch's name for `guidance`, which is used where guidance is None.
        guidance: guidance weight, a number or [B]; 1 is no guidance.
        guidance_interval: (low, high) in log-SNR: only steps at low <= log-SNR < high have guidance, see
            `GaussianDiffusion.sample`. None: all steps.
        sampler: "ddpm", "ddim", "dpm++", or "consistency" for a distilled decoder, whose default it is; None
            is "ddpm" for the others.
        size: side, or height and width, of the images in pixels; None is image_size.
        batch_size: the number of images, needed only if there are no conditions.
        image: images of which a part is kept: inpainting, by any decoder. The noised image replaces the kept
            pixels in every step, and they come out unchanged; a decoder with inpaint=True also receives them.
        mask: where `image` is repainted.
        init_image: images to start from. Their noised version is the start, and only the last `strength` of
            the steps are made (SDEdit, 2108.01073).
        strength: fraction of the steps in (0, 1]; 1 makes all of them and ignores init_image.
        progress: see `GaussianDiffusion.sample`.
        sampler_options: more keywords of `GaussianDiffusion.sample` (eta, guidance_rescale, clip,
            dynamic_threshold, spacing, x_T, start, resample, jump, callback).

    Returns:
        Images [B, C, H, W] in [0, 1], float32 (float64 for float64 weights).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or value, or is missing.
    """
    given = next((x for x in (image_embed, text, text_encodings) if x is not None), None)
    if given is None and batch_size is None:
        raise ValueError("image_embed, text: expected at least one of them, or a batch_size, got none")
    batch = batch_size if batch_size is not None else len(given)
    weight = decoder.unet.conv_in.weight
    device = weight.device
    caption = encode_captions(decoder, batch, text, text_encodings, text_mask, text_embed)
    seeds = resolve_seeds(seeds, batch, device, generator)
    height, width = (
        (decoder.image_size,) * 2 if size is None else (size, size) if isinstance(size, int) else size
    )
    shape = (batch, decoder.channels, height, width)
    # The state stays in float32 also for half-precision weights, whose rounding would swamp small steps.
    dtype = compute_dtype(weight.dtype)
    sampler, steps = resolve_sampler(decoder, sampler, steps, sampler_options.get("spacing"))
    if decoder.guidance_input is not None:
        check_no_unconditional_rows(decoder.part, guidance_interval=guidance_interval)
    if (image is None) != (mask is None):
        raise ValueError("image, mask: expected both or neither")
    if mask is not None:
        check_images("image", image, decoder.channels, (height, width), batch)
        mask = check_inpainting_mask(mask, shape).to(device)
        sampler_options |= dict(known=image.to(device, dtype) * 2 - 1, mask=mask)
    if (init_image is None) != (strength is None):
        raise ValueError("init_image, strength: expected both or neither")
    if init_image is not None:
        check_images("init_image", init_image, decoder.channels, (height, width), batch)
        x0 = init_image.to(device, dtype) * 2 - 1
        spacing = sampler_options.get("spacing") or spacing_of(sampler)
        sampler_options |= _start_from(decoder.diffusion, x0, strength, steps, seeds, spacing)
    extra = None
    if decoder.inpaint:
        known = sampler_options.get("known")
        extra = nothing_kept(shape, weight) if mask is None else kept_channels(known, mask)
    guidance = cond_scale if guidance is None else guidance
    denoiser = guided_denoiser(decoder, batch, image_embed, caption, guidance, negative, extra)
    images = decoder.diffusion.sample(
        shape=shape, seeds=seeds, guidance_interval=guidance_interval, sampler=sampler, steps=steps,
        progress=progress, device=device, dtype=dtype, **denoiser._asdict(), **sampler_options,
    )  # fmt: skip
    images = ((images + 1) / 2).clamp(0, 1)
    return images if mask is None else torch.where(mask, images, image.to(images))


@torch.no_grad()
def invert(
    decoder: Decoder,
    image: Tensor,  # [B, C, H, W] in [0, 1]
    image_embed: Tensor | None = None,  # [B, image_embed_dim]
    text: Tensor | None = None,  # int64 [B, L]
    *,
    text_encodings: Tensor | None = None,  # [B, L, text_encoding_dim]
    text_mask: Tensor | None = None,  # bool [B, L], True = a token
    text_embed: Tensor | None = None,  # [B, text_embed_dim]
    negative: Tensor | tuple | None = None,
    steps: int = 50,
    cond_scale: float | Tensor = 1.0,
    guidance_interval: Sequence[float] | None = None,  # (low, high) in log-SNR
    progress: Progress = None,
    **options: Any,
) -> Tensor:
    """Find the noise x_T that leads to an image by DDIM.

    `sample(x_T=..., sampler="ddim")` with the same conditions, steps and guidance returns about this image.

    Args:
        decoder: the decoder.
        image: the images.
        image_embed: as in `sample`, like the other conditions.
        text: as in `sample`.
        text_encodings: as in `sample`.
        text_mask: as in `sample`.
        text_embed: as in `sample`.
        negative: as in `sample`.
        steps: the number of steps, >= 2.
        cond_scale: guidance weight, a number or [B]; 1 is no guidance.
        guidance_interval: (low, high) in log-SNR, as in `sample`.
        progress: see `GaussianDiffusion.sample`.
        options: more keywords of `GaussianDiffusion.invert` (refine, clip).

    Returns:
        x_T, [B, C, H, W], float32 (float64 for float64 weights).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or value, or the decoder is distilled.
    """
    if decoder.consistency_steps is not None:
        raise ValueError("invert: expected a decoder that was not distilled: DDIM takes many small steps")
    check_images("image", image, decoder.channels)
    weight = decoder.unet.conv_in.weight
    dtype = compute_dtype(weight.dtype)
    x0 = image.to(weight.device, dtype) * 2 - 1
    caption = encode_captions(decoder, len(x0), text, text_encodings, text_mask, text_embed)
    extra = nothing_kept(x0.shape, weight) if decoder.inpaint else None
    denoiser = guided_denoiser(decoder, len(x0), image_embed, caption, cond_scale, negative, extra)
    options |= dict(guidance_interval=guidance_interval, progress=progress)
    return decoder.diffusion.invert(x0=x0, steps=steps, **denoiser._asdict(), **options)


def _start_from(
    diffusion: GaussianDiffusion, x0: Tensor, strength: float, steps: int, seeds: Tensor, spacing: str
) -> dict[str, Any]:
    """The options of `GaussianDiffusion.sample` that start from x0, noised, and make a part of the steps."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise ValueError(f"strength: expected a number in (0, 1], got {strength!r}")
    start = steps - max(1, round(strength * steps))
    if start == 0:  # all steps: start from noise alone
        return {}
    time = diffusion.times(steps, spacing)[start]
    return dict(x_T=diffusion.add_noise(x0, time.expand(len(x0)), seeds=seeds), start=start)
