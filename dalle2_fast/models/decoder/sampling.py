"""Sampling from a decoder: images from conditions, edited images, and the noise that an image came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle2_fast.data.images import check_images
from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.progress import Progress
from dalle2_fast.models.decoder.encoding import encode_captions
from dalle2_fast.models.decoder.guidance import guided_denoiser
from dalle2_fast.models.decoder.inpainting import check_inpainting_mask, kept_channels, nothing_kept
from dalle2_fast.models.inputs import resolve_seeds
from dalle2_fast.ops._dtypes import compute_dtype

if TYPE_CHECKING:
    from dalle2_fast.models.decoder.model import Decoder


@torch.no_grad()
def sample(
    decoder: Decoder,
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
    progress: Progress = None,
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
    weight = decoder.unet.conv_in.weight
    device = weight.device
    caption = encode_captions(decoder, batch, text, text_encodings, text_mask, text_embed)
    seeds = resolve_seeds(seeds, batch, device, generator)
    height, width = (
        (decoder.image_size,) * 2 if size is None else (size, size) if isinstance(size, int) else size
    )
    shape = (batch, decoder.channels, height, width)
    # Small steps in bfloat16 would drown in rounding: the state stays in float32.
    dtype = compute_dtype(weight.dtype)
    steps = decoder.sample_timesteps if steps is None else steps
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
        x0, spacing = init_image.to(device, dtype) * 2 - 1, sampler_options.get("spacing", "time")
        sampler_options |= _start_from(decoder.diffusion, x0, strength, steps, seeds, spacing)
    extra = None
    if decoder.inpaint:
        known = sampler_options.get("known")
        extra = nothing_kept(shape, weight) if mask is None else kept_channels(known, mask)
    guidance = cond_scale if guidance is None else guidance
    denoise, guidance = guided_denoiser(decoder, batch, image_embed, caption, guidance, negative, extra)
    images = decoder.diffusion.sample(
        denoise, shape, seeds=seeds, guidance=guidance, sampler=sampler, steps=steps, progress=progress,
        device=device, dtype=dtype, **sampler_options,
    )  # fmt: skip
    images = ((images + 1) / 2).clamp(0, 1)
    return images if mask is None else torch.where(mask, images, image.to(images))


@torch.no_grad()
def invert(
    decoder: Decoder,
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
    progress: Progress = None,
    **options,
) -> Tensor:
    """The noise x_T [B, C, H, W], float32, from which `sample(x_T=..., sampler="ddim")` with the same
    conditions, steps and guidance draws about this image. refine, clip: see GaussianDiffusion.invert."""
    check_images("image", image, decoder.channels)
    weight = decoder.unet.conv_in.weight
    dtype = compute_dtype(weight.dtype)
    x0 = image.to(weight.device, dtype) * 2 - 1
    caption = encode_captions(decoder, len(x0), text, text_encodings, text_mask, text_embed)
    extra = nothing_kept(x0.shape, weight) if decoder.inpaint else None
    denoise, guidance = guided_denoiser(decoder, len(x0), image_embed, caption, cond_scale, negative, extra)
    options |= dict(guidance=guidance, progress=progress)
    return decoder.diffusion.invert(denoise, x0, steps=steps, **options)


def _start_from(
    diffusion: GaussianDiffusion, x0: Tensor, strength: float, steps: int, seeds: Tensor, spacing: str
) -> dict[str, Any]:
    """Options of GaussianDiffusion.sample that start it from x0, noised, with a part of its steps left."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise ValueError(f"strength: expected a number in (0, 1], got {strength!r}")
    start = steps - max(1, round(strength * steps))
    if start == 0:  # all steps, from noise alone
        return {}
    time = diffusion.times(steps, spacing)[start]
    return dict(x_T=diffusion.add_noise(x0, time.expand(len(x0)), seeds=seeds), start=start)
