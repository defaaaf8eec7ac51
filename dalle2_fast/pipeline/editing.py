"""Image editing with pairs (z, x_T) of a CLIP image embedding and the decoder's noise: unCLIP, section 3.

Variations sample many x_T for one z; interpolation and text diffs turn z on a great circle; inpainting keeps
a part of the image. The functions are methods of DALLE2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.data.images import as_images, as_mask, expect_one
from dalle2_fast.ops._dtypes import compute_dtype
from dalle2_fast.pipeline.context import Generation, GenerationContext
from dalle2_fast.pipeline.decoding import decode, embed_image, encode_decoder_captions, split_options
from dalle2_fast.pipeline.inversion import add_seconds, invert_for_decoding
from dalle2_fast.pipeline.like_diffusers.offload import resident
from dalle2_fast.pipeline.progress import Progress, StepCallback
from dalle2_fast.pipeline.settings import check_count, resolve_settings, resolve_size
from dalle2_fast.pipeline.slerp import slerp
from dalle2_fast.pipeline.stages import (
    KeptImage,
    check_candidates,
    check_prior,
    choose_candidates,
    encode_captions,
    sample_decoder,
    sample_image_embeddings,
    upsample,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from dalle2_fast.pipeline.dalle2 import DALLE2
    from dalle2_fast.pipeline.decoding import ImageInput


def variations(
    pipe: DALLE2,
    image: ImageInput,
    num_images: int = 4,
    *,
    eta: float = 1.0,
    inversion_steps: int | None = None,
    **options: Any,
) -> Generation:
    """Images with the content of the given one: its z, decoded with DDIM and eta > 0.

    Args:
        image: one or several images, as in `embed_image`.
        num_images: variations of each.
        eta: of DDIM, in [0, 1].
        inversion_steps: start from the image's x_T, found by DDIM inversion with so many steps, as the paper
            does; a larger eta then strays farther, and eta 0 samples the image again. None: each variation
            starts from other noise.
        options: those of `decode`. With inversion_steps, guidance is 1 unless it is given.

    Source:
        unCLIP, arXiv 2204.06125, section 3.1.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> pipe = DALLE2.from_pretrained()
        >>> pipe.variations(torch.rand(3, 64, 64), 2, steps=2, size=64, seed=0).images.shape
        torch.Size([2, 3, 64, 64])
    """
    images = as_images("image", image, pipe.device)
    inversions, options = invert_for_decoding(pipe, [images], inversion_steps, options)
    x_T = inversions[0].x_T if inversions else None
    made = decode(pipe, embed_image(pipe, images), num_images, x_T=x_T, eta=eta, **options)
    return add_seconds(made, inversions)


def interpolate(
    pipe: DALLE2,
    first: ImageInput,
    second: ImageInput,
    num_frames: int = 8,
    *,
    noise: str = "fixed",
    inversion_steps: int = 50,
    **options: Any,
) -> Generation:
    """From one image to another: z = slerp(z_1, z_2, theta), theta from 0 to 1 in `num_frames` images.

    Args:
        first: one image, as in `embed_image`.
        second: one image.
        num_frames: at least 2.
        noise: "fixed" samples every frame from the same x_T, that of the seed, so that the frames differ in
            content alone. "slerp" interpolates x_T, too, between those of the two images, so that the first
            and the last frame are the images.
        inversion_steps: DDIM steps with which noise="slerp" finds these x_T.
        options: those of `decode`. With noise="slerp", guidance is 1 unless it is given.

    Source:
        unCLIP, arXiv 2204.06125, section 3.2.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> pipe = DALLE2.from_pretrained()
        >>> first, second = torch.rand(2, 3, 64, 64)
        >>> pipe.interpolate(first, second, 3, steps=2, size=64, seed=0).images.shape
        torch.Size([3, 3, 64, 64])
    """
    _check_frames(num_frames)
    if noise not in ("fixed", "slerp"):
        raise ValueError(f"noise: expected 'fixed' or 'slerp', got {noise!r}")
    ends = [
        expect_one(name, as_images(name, image, pipe.device))
        for name, image in (("first", first), ("second", second))
    ]
    theta = torch.linspace(0, 1, num_frames, device=pipe.device)
    steps = inversion_steps if noise == "slerp" else None
    inversions, options = invert_for_decoding(pipe, ends, steps, options)
    x_T = None
    if inversions:
        noise_first, noise_second = (pair.x_T.expand(num_frames, -1, -1, -1) for pair in inversions)
        x_T = slerp(noise_first, noise_second, theta)
    z_first, z_second = (embed_image(pipe, image).expand(num_frames, -1) for image in ends)
    return add_seconds(decode(pipe, slerp(z_first, z_second, theta), x_T=x_T, **options), inversions)


@torch.no_grad()
def text_diff(
    pipe: DALLE2,
    image: ImageInput,
    source: str,
    target: str,
    num_frames: int = 6,
    *,
    theta: float = 0.35,
    inversion_steps: int | None = 50,
    **options: Any,
) -> Generation:
    """Change an image by the difference of two captions: z = slerp(z_i, |z_i| norm(z_target - z_source), .).

    The angle of the `num_frames` images grows from 0, the image itself, to `theta`.

    Args:
        image: one image, as in `embed_image`.
        source: a caption of the image.
        target: a caption of the changed image.
        num_frames: at least 2.
        theta: where the last frame is between image and difference, in [0, 1]; the paper takes 0.25 to 0.5.
        inversion_steps: DDIM steps with which the image's x_T is found, from which every frame is sampled;
            None samples from the x_T of the seed.
        options: those of `decode`. With inversion_steps, guidance is 1 unless it is given.

    Source:
        unCLIP, arXiv 2204.06125, section 3.3.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> pipe = DALLE2.from_pretrained()
        >>> captions = "a small red circle", "a large red circle"
        >>> few = dict(steps=2, inversion_steps=2, size=64)
        >>> pipe.text_diff(torch.rand(3, 64, 64), *captions, 2, **few).images.shape
        torch.Size([2, 3, 64, 64])
    """
    _check_frames(num_frames)
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 0 <= theta <= 1:
        raise ValueError(f"theta: expected a number in [0, 1], got {theta!r}")
    images = expect_one("image", as_images("image", image, pipe.device))
    tokens = pipe.tokenizer.encode([source, target]).to(pipe.device)
    with resident(pipe, "clip"):
        text = pipe.clip.encode_text(tokens, normalize=True)[0]
    text = text.to(compute_dtype(text.dtype))
    if torch.equal(text[0], text[1]):
        raise ValueError(f"source, target: expected captions that differ, got {source!r} twice")
    embed = embed_image(pipe, images)
    inversions, options = invert_for_decoding(pipe, [images], inversion_steps, options)
    x_T = inversions[0].x_T.expand(num_frames, -1, -1, -1) if inversions else None
    difference = F.normalize(text[1:] - text[:1], dim=-1) * embed.norm(dim=-1, keepdim=True)
    thetas = torch.linspace(0, theta, num_frames, device=pipe.device)
    z_image, z_difference = (end.to(text).expand(num_frames, -1) for end in (embed, difference))
    z = slerp(z_image, z_difference, thetas)
    return add_seconds(decode(pipe, z, x_T=x_T, **options), inversions)


@torch.no_grad()
def inpaint(
    pipe: DALLE2,
    image: ImageInput,
    mask: Tensor | Image,
    prompt: str | Sequence[str] | None = None,
    num_images: int = 4,
    *,
    resample: int = 1,
    jump: int = 10,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    prior_steps: int | None = None,
    prior_guidance: float | None = None,
    prior_guidance_interval: tuple[float, float] | None = None,
    prior_candidates: int | None = None,
    candidates: int | None = None,
    sampler: str | None = None,
    prior_sampler: str | None = None,
    size: int | None = None,
    batch_size: int | None = None,
    progress: Progress = False,
    graphs: bool | str = "auto",
    callback: StepCallback | None = None,
    **settings: Any,
) -> Generation:
    """Repaint an image where the mask is 1; where it is 0, keep it, to the bit at the size of the result.

    Args:
        image: one or several images, as in `embed_image`.
        mask: [S, S], [1, S, S] or [P, 1, S, S] of 0 and 1 (or bool), or a PIL image, which is repainted where
            it is lighter than middle grey; of any size; one for all images, or one for each.
        prompt: a caption of the whole result, kept part included, or one for each image; None: z is that of
            the image, and the kept part decides.
        num_images: results of each image.
        resample: how often each stretch of `jump` steps is sampled, see GaussianDiffusion.sample; more
            resampling means fewer seams.
        jump: steps of a stretch.
        seed: as in `generate`.
        generator: as in `generate`.
        prior_steps: as in `generate`.
        prior_guidance: as in `generate`.
        prior_guidance_interval: as in `generate`.
        prior_candidates: as in `generate`.
        candidates: as in `generate`. Without a prompt there is nothing to choose by: 1.
        sampler: of every stage, as in `generate`.
        prior_sampler: as in `generate`.
        size: as in `generate`.
        batch_size: as in `generate`.
        progress: as in `generate`.
        graphs: as in `generate`.
        callback: as in `generate`.
        settings: as in `decode`.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range, or an option that is not listed.

    Source:
        RePaint, arXiv 2201.09865.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> pipe = DALLE2.from_pretrained(device="cpu", dtype="fp32")
        >>> image, mask = torch.rand(3, 64, 64), torch.zeros(64, 64)
        >>> mask[:32] = 1
        >>> made = pipe.inpaint(image, mask, "a red circle", 1, steps=2, prior_steps=2, size=64).images
        >>> torch.equal(made[0, :, 32:], image[:, 32:])
        True
    """
    images, masks = as_images("image", image, pipe.device), as_mask("mask", mask, pipe.device)
    inputs = len(images)
    if len(masks) not in (1, inputs):
        raise ValueError(f"mask: expected one or {inputs}, one for each image, got {len(masks)}")
    kept = KeptImage(images, masks)
    mine, decoder_options = split_options(settings)
    mine |= dict(
        prior_steps=prior_steps, prior_guidance=prior_guidance,
        prior_guidance_interval=prior_guidance_interval, prior_candidates=prior_candidates, sampler=sampler,
        prior_sampler=prior_sampler,
    )  # fmt: skip
    size = resolve_size(pipe, size)
    if prompt is None:
        if candidates not in (None, 1):
            raise ValueError(f"candidates: expected 1, as no prompt chooses among them, got {candidates}")
        candidates = 1
    chosen = resolve_settings(pipe, size, candidates=candidates, **mine)
    check_candidates(pipe, chosen.candidates)
    if pipe.decoder.channels != 3:
        raise ValueError(f"image: expected a decoder of 3 channels, got {pipe.decoder.channels}")
    prompts = [prompt] * inputs if isinstance(prompt, str) else prompt
    if prompts is not None and len(prompts) != inputs:
        raise ValueError(f"prompt: expected one caption or {inputs}, got {len(prompts)}")
    context = GenerationContext.for_inputs(
        pipe, inputs, num_images, candidates=chosen.candidates, seed=seed, generator=generator,
        batch_size=batch_size, progress=progress, graphs=graphs, callback=callback,
    )  # fmt: skip
    with context.evaluation_mode():
        if prompts is None:
            image_embed = context.repeat(embed_image(pipe, images))
            captions = encode_decoder_captions(context, None, inputs, chosen)
        else:
            check_prior(pipe, prior_steps=prior_steps, prior_guidance_interval=prior_guidance_interval)
            encoded = encode_captions(context, prompts, chosen.negative_prompt)
            image_embed = sample_image_embeddings(context, encoded, chosen)
            captions = encoded.for_decoder
        known, unknown = kept.at(pipe.decoder.image_size, len(image_embed))
        low_res = sample_decoder(
            context,
            image_embed,
            captions,
            chosen,
            image=known,
            mask=unknown,
            resample=resample,
            jump=jump,
            **decoder_options,
        )
        if prompts is not None:
            low_res, image_embed = choose_candidates(context, low_res, image_embed, prompts, chosen)
        images = upsample(context, low_res, chosen, size, kept)
    return context.result(images, low_res, image_embed)


def _check_frames(num_frames: int) -> None:
    if check_count("num_frames", num_frames) < 2:
        raise ValueError(f"num_frames: expected at least 2, got {num_frames}")
