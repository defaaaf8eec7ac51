"""The stages of unCLIP, in order: captions -> image embeddings -> decoder -> upsamplers.

Each stage is a function of the call's GenerationContext, the result of the stage before it and the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dalle2_fast.data.images import as_images, resized, resized_mask
from dalle2_fast.pipeline.context import GenerationContext, check_finite
from dalle2_fast.pipeline.like_diffusers.offload import resident
from dalle2_fast.pipeline.settings import SamplingSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from dalle2_fast.pipeline.dalle2 import DALLE2


class EncodedCaptions(NamedTuple):
    """What captions add to the arguments of `sample`, one row per image."""

    for_prior: dict[str, Any]
    for_decoder: dict[str, Any]


class KeptImage(NamedTuple):
    """Images that inpainting keeps where the mask is False."""

    image: Tensor  # [P, 3, S, S] in [0, 1]
    mask: Tensor  # bool [P or 1, 1, S, S], True = repaint

    def at(self, side: int, rows: int) -> tuple[Tensor, Tensor]:
        """Image [rows, 3, side, side] and mask [rows, 1, side, side], rows of an image side by side."""
        both = resized(self.image, side), resized_mask(self.mask, side)
        image, mask = (each.repeat_interleave(rows // len(each), dim=0) for each in both)
        return image, mask


def encode_captions(
    context: GenerationContext,
    prompts: Sequence[str],  # one per input; none if only the negative prompt is a condition
    negative_prompt: str | None,
) -> EncodedCaptions:
    """Captions -> what the prior and the decoder are conditioned on. ValueError for an unknown word."""
    pipe = context.pipe
    # A network that takes guidance as an input has learned it with the negative caption of its teacher.
    leads_away = {
        name: network is None or network.guidance_input is None
        for name, network in (("prior", pipe.prior), ("decoder", pipe.decoder))
    }
    if negative_prompt is not None and not any(leads_away.values()):
        raise ValueError(
            "negative_prompt: expected None, because prior and decoder take guidance as an input, got "
            f"{negative_prompt!r}"
        )
    tokens = _tokenize(pipe, prompts)
    negative_tokens = _tokenize(pipe, [] if negative_prompt is None else [negative_prompt])
    # Networks that were trained on CLIP's raw projections need the length of the embedding, too.
    unit_norm = all(net.unit_norm for net in (pipe.prior, pipe.decoder) if net is not None)
    with context.timer("text") as track, resident(pipe, "clip"):
        for _ in track(range(1), 1):  # one step, so that the stage shows progress
            caption = None if tokens is None else pipe.clip.encode_text(tokens, normalize=unit_norm)
            # The negative caption is a batch of its own, because a CPU may round one row and two rows
            # differently, and the encodings of the prompts must not depend on whether there is one.
            negative = None
            if negative_tokens is not None:
                negative = pipe.clip.encode_text(negative_tokens, normalize=unit_norm)
            for encoded in (caption, negative):
                if encoded is not None:
                    check_finite("text", encoded[0], pipe.dtype)
                    check_finite("text", encoded[1], pipe.dtype)
    reads_tokens = pipe.decoder.text_encoder is not None  # the decoder encodes captions itself
    for_prior: dict[str, Any] = {}
    for_decoder: dict[str, Any] = {}
    if tokens is not None and caption is not None:
        embed, encodings, mask = (context.repeat(tensor) for tensor in caption)
        for_prior = {"text_embed": embed, "text_encodings": encodings, "text_mask": mask}
        for_decoder = {"text": context.repeat(tokens)} if reads_tokens else dict(for_prior)
    if negative_tokens is not None:
        if leads_away["prior"]:
            for_prior["negative"] = negative
        if leads_away["decoder"]:
            for_decoder["negative"] = context.repeat(negative_tokens) if reads_tokens else negative
    return EncodedCaptions(for_prior, for_decoder)


def _tokenize(pipe: DALLE2, captions: Sequence[str]) -> Tensor | None:
    return pipe.tokenizer.encode(captions).to(pipe.device) if captions else None


def check_prior(pipe: DALLE2, **of_diffusion: Any) -> None:
    """ValueError if the pipeline has no prior, or one without the diffusion whose settings are given."""
    if pipe.prior is None:
        raise ValueError(
            "prompt: this pipeline has no prior to make an image embedding of it; it can only do what begins "
            "with an image (variations, interpolate, ...)"
        )
    for name, value in of_diffusion.items():
        if value is not None and not pipe.prior.diffuses:
            raise ValueError(f"{name}: an autoregressive prior has none, got {value}")


def sample_image_embeddings(
    context: GenerationContext, captions: EncodedCaptions, settings: SamplingSettings
) -> Tensor:  # [B, D]
    """The prior: captions -> CLIP image embeddings."""
    prior = context.pipe.prior
    of_diffusion = {}
    if prior.diffuses:
        of_diffusion = {
            "steps": settings.prior_steps,
            "sampler": settings.sampler_of("prior"),
            "guidance_interval": settings.prior_guidance_interval,
        }
    return context.sample(
        "prior",
        prior.sample,
        diffuses=prior.diffuses,
        cond_scale=settings.prior_guidance,
        num_samples_per_batch=settings.prior_candidates,
        **captions.for_prior,
        **of_diffusion,
    )


def prepare_init_image(
    context: GenerationContext, init_image: Tensor | Image | Sequence[Image], inputs: int
) -> Tensor:  # [B, 3, S, S]
    """The image that the decoder starts from, at its size: one for all inputs, or one for each."""
    pipe = context.pipe
    start = resized(as_images("init_image", init_image, pipe.device), pipe.decoder.image_size)
    if len(start) not in (1, inputs):
        raise ValueError(f"init_image: expected one image or {inputs}, got {len(start)}")
    return context.repeat(start.expand(inputs, -1, -1, -1))


def sample_decoder(
    context: GenerationContext,
    image_embed: Tensor,  # [B, D]
    captions: dict[str, Any],  # EncodedCaptions.for_decoder; empty leaves the caption out
    settings: SamplingSettings,
    *,
    sampler: str | None = None,
    **options: Any,
) -> Tensor:  # [B, 3, S, S] in [0, 1]
    """The decoder: image embeddings and captions -> images. sampler: instead of the one in `settings`.
    options: further arguments of Decoder.sample."""
    return context.sample(
        "decoder",
        context.pipe.decoder.sample,
        steps=settings.steps,
        image_embed=image_embed,
        sampler=settings.sampler_of("decoder") if sampler is None else sampler,
        cond_scale=settings.guidance,
        guidance_interval=settings.guidance_interval,
        **captions,
        **options,
    )


def check_candidates(pipe: DALLE2, candidates: int) -> None:
    """ValueError if there are several candidates and CLIP cannot compare them with the caption."""
    if candidates > 1 and pipe.clip.visual is None:
        raise ValueError(f"candidates: expected 1, because this CLIP has no image tower, got {candidates}")


def choose_candidates(
    context: GenerationContext,
    low_res: Tensor,  # [B, 3, S, S], the candidates of one image next to each other
    image_embed: Tensor,  # [B, D]
    prompts: Sequence[str],
    settings: SamplingSettings,
) -> tuple[Tensor, Tensor]:  # [B / candidates, *] each
    """Keep of each image's candidates the one whose CLIP embedding is nearest (cosine) to the caption's."""
    count = settings.candidates
    if count == 1:
        return low_res, image_embed
    pipe = context.pipe
    with resident(pipe, "clip"):
        text = pipe.clip.encode_text(pipe.tokenizer.encode(prompts).to(pipe.device))[0].float()
        image = pipe.clip.encode_image(resized(low_res, pipe.clip.image_size)).float()
    rows = image.unflatten(0, (len(prompts), -1, count))
    cosine = check_finite("candidates", torch.einsum("pncd,pd->pnc", rows, text), pipe.dtype)
    first = torch.arange(0, len(low_res), count, device=low_res.device)
    best = first + cosine.argmax(dim=2).flatten()
    context.select(best)
    return low_res[best], image_embed[best]


def upsample(
    context: GenerationContext,
    low_res: Tensor,  # [B, 3, S, S] in [0, 1]
    settings: SamplingSettings,
    size: int,  # one of pipe.sizes
    kept: KeptImage | None = None,
) -> Tensor:  # [B, 3, size, size] in [0, 1]
    """The upsamplers that `size` needs. kept: every stage keeps this image where its mask is False."""
    pipe, images = context.pipe, low_res
    upsamplers = [
        ("upsampler", pipe.upsampler, settings.upsampler_steps),
        ("upsampler2", pipe.upsampler2, settings.upsampler2_steps),
    ]
    for stage, upsampler, steps in upsamplers[: pipe.sizes.index(size)]:
        known = {}
        if kept is not None:
            image, mask = kept.at(upsampler.image_size, len(low_res))
            known = {"known": image * 2 - 1, "mask": mask}
        images = context.sample(
            stage,
            upsampler.sample,
            low_res=images,
            steps=steps,
            sampler=settings.sampler_of(stage),
            tile=settings.tile,
            **known,
        )
        if kept is not None:  # bit for bit, because the way through [-1, 1] rounds
            images = torch.where(mask, images, image.to(images))
    return images
