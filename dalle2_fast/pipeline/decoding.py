"""The pipeline without its prior: an image's CLIP embedding, and images from embeddings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle2_fast.data.images import as_images, resized
from dalle2_fast.pipeline.context import Generation, GenerationContext, check_finite
from dalle2_fast.pipeline.like_diffusers.offload import resident
from dalle2_fast.pipeline.progress import Progress, StepCallback
from dalle2_fast.pipeline.settings import SamplingSettings, check_count, resolve_settings, resolve_size
from dalle2_fast.pipeline.stages import encode_captions, sample_decoder, upsample

if TYPE_CHECKING:
    from PIL.Image import Image

    from dalle2_fast.pipeline.dalle2 import DALLE2

    ImageInput = Tensor | Image | Sequence[Image]

# What `decode` takes of SamplingSettings: it has no prior, does not choose among candidates, and fixes the
# sampler.
SETTINGS = frozenset({
    "steps", "guidance", "guidance_interval", "negative_prompt",
    "upsampler_steps", "upsampler2_steps", "upsampler_sampler", "upsampler2_sampler", "tile",
})  # fmt: skip
DECODER_OPTIONS = frozenset({"guidance_rescale", "clip", "dynamic_threshold", "spacing"})


def embed_image(pipe: DALLE2, image: ImageInput) -> Tensor:
    """CLIP's embeddings z of images, as the prior and the decoder use them.

    Args:
        image: tensor [3, S, S] or [B, 3, S, S] in [0, 1], a PIL image, or several; square, of any size.

    Returns:
        [B, D]; of unit norm, unless the decoder was trained on CLIP's raw projections.

    Raises:
        TypeError, ValueError: `image` is none of these.
        FloatingPointError: the embeddings are not finite (float16 may overflow).

    Example:
        >>> from dalle2_fast import DALLE2
        >>> DALLE2.from_pretrained().embed_image(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 192])
    """
    images = as_images("image", image, pipe.device)
    with torch.no_grad(), resident(pipe, "clip"):
        small = resized(images, pipe.clip.image_size)
        embed = pipe.clip.encode_image(small, normalize=pipe.decoder.unit_norm)
    return check_finite("image embedding", embed, pipe.dtype)


@torch.no_grad()
def decode(
    pipe: DALLE2,
    image_embed: Tensor,  # [P, D]
    num_images: int = 1,
    *,
    prompt: str | Sequence[str] | None = None,
    x_T: Tensor | None = None,  # [P, C, S, S]
    eta: float = 0.0,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    size: int | None = None,
    batch_size: int | None = None,
    progress: Progress = False,
    graphs: bool | str = "auto",
    callback: StepCallback | None = None,
    **settings: Any,
) -> Generation:
    """Image embeddings -> images: the pipeline without its prior. The decoder samples with DDIM.

    Args:
        image_embed: floating-point [P, D], as `embed_image` and the prior give them.
        num_images: images of each embedding.
        prompt: a caption for the decoder, or one for each embedding; None leaves the caption out.
        x_T: [P, C, S, S], the noise to start from, of the decoder's size S; None is noise from the seed.
        eta: of DDIM, in [0, 1]: 0 is deterministic given (z, x_T), 1 as random as DDPM. A distilled decoder
            has no DDIM: its steps after the first one have noise of the seed.
        seed: as in `generate`.
        generator: as in `generate`.
        size: as in `generate`.
        batch_size: as in `generate`.
        progress: as in `generate`.
        graphs: as in `generate`.
        callback: as in `generate`.
        settings: `steps`, `guidance`, `guidance_interval`, `negative_prompt`, `upsampler_steps`,
            `upsampler2_steps`, `upsampler_sampler`, `upsampler2_sampler` and `tile` as in `generate`;
            `guidance_rescale`, `clip`, `dynamic_threshold` and `spacing` as in GaussianDiffusion.sample.
            As in every method that begins with an image, `steps`, `guidance`, `num_images` and
            `upsampler_steps` may have diffusers' names, and `output_type` is as in `generate`.

    Returns:
        A Generation of P * num_images rows. A row depends on its inputs and the seed, not on the number of
        rows.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range, or an option that is not listed.
        FloatingPointError: the result of a stage is not finite (float16 may overflow).

    Example:
        >>> from dalle2_fast import DALLE2
        >>> pipe = DALLE2.from_pretrained()
        >>> z = pipe.embed_image(torch.rand(1, 3, 64, 64))
        >>> pipe.decode(z, 2, steps=2, size=64, seed=0).images.shape
        torch.Size([2, 3, 64, 64])
    """
    _check_embed(image_embed, pipe.decoder.image_embed_dim)
    inputs = len(image_embed)
    mine, decoder_options = split_options(settings)
    size = resolve_size(pipe, size)
    chosen = resolve_settings(pipe, size, **mine)
    if x_T is not None:
        shape = (inputs, pipe.decoder.channels, *(pipe.decoder.image_size,) * 2)
        if tuple(x_T.shape) != shape:
            raise ValueError(f"x_T: expected [P, C, S, S] = {shape}, got {tuple(x_T.shape)}")
        if not torch.isfinite(x_T).all():
            raise ValueError("x_T: expected finite numbers, got others")
        decoder_options["x_T"] = x_T.repeat_interleave(check_count("num_images", num_images), dim=0)
    context = GenerationContext.for_inputs(
        pipe, inputs, num_images, seed=seed, generator=generator, batch_size=batch_size, progress=progress,
        graphs=graphs, callback=callback,
    )  # fmt: skip
    with context.evaluation_mode():
        captions = encode_decoder_captions(context, prompt, inputs, chosen)
        image_embed = context.repeat(image_embed.to(pipe.device))
        # A distilled decoder has one sampler, which starts from x_T as well and has no eta.
        if pipe.decoder.consistency_steps is None:
            decoder_options |= {"sampler": "ddim", "eta": eta}
        else:
            decoder_options |= {"sampler": "consistency"}
        low_res = sample_decoder(context, image_embed, captions, chosen, **decoder_options)
        images = upsample(context, low_res, chosen, size)
    return context.result(images, low_res, image_embed)


def split_options(
    options: Mapping[str, Any], names: Collection[str] = SETTINGS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The SamplingSettings `names` among `options`, and the arguments of Decoder.sample. TypeError for any
    other."""
    settings = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    if unknown := rest.keys() - DECODER_OPTIONS:
        raise TypeError(f"{', '.join(sorted(unknown))}: not an option here")
    return settings, rest


def encode_decoder_captions(
    context: GenerationContext, prompt: str | Sequence[str] | None, inputs: int, settings: SamplingSettings
) -> dict[str, Any]:
    """What captions add to the arguments of Decoder.sample: one caption for all inputs, or one for each.

    Weights that were trained with a caption where others have none (Karlo: the empty one) get that caption
    for None; it is the checkpoint's negative prompt.
    """
    prompt = context.pipe.sampling.get("negative_prompt") if prompt is None else prompt
    if prompt is None and settings.negative_prompt is None:
        return {}
    prompts: list[str] = []
    if prompt is not None:
        prompts = [prompt] * inputs if isinstance(prompt, str) else list(prompt)
        if len(prompts) != inputs:
            raise ValueError(f"prompt: expected one caption or {inputs}, got {len(prompts)}")
    return encode_captions(context, prompts, settings.negative_prompt).for_decoder


def _check_embed(image_embed: Tensor, width: int) -> None:
    if not isinstance(image_embed, Tensor) or not image_embed.is_floating_point():
        came = image_embed.dtype if isinstance(image_embed, Tensor) else type(image_embed).__name__
        raise TypeError(f"image_embed: expected a floating-point tensor [P, {width}], got {came}")
    if image_embed.ndim != 2 or image_embed.shape[1] != width or not len(image_embed):
        raise ValueError(f"image_embed: expected [P >= 1, {width}], got {tuple(image_embed.shape)}")
    if not torch.isfinite(image_embed).all():
        raise ValueError("image_embed: expected finite numbers, got others")
