"""DDIM inversion: the pair (z, x_T) of an image, from which the decoder samples the image again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle2_fast.data.images import as_images, resized
from dalle2_fast.pipeline.context import Generation, GenerationContext
from dalle2_fast.pipeline.decoding import embed_image, encode_decoder_captions
from dalle2_fast.pipeline.progress import Progress
from dalle2_fast.pipeline.settings import resolve_settings

if TYPE_CHECKING:
    from dalle2_fast.pipeline.dalle2 import DALLE2
    from dalle2_fast.pipeline.decoding import ImageInput


@dataclass
class Inversion:
    """An image as (z, x_T).

    `pipe.decode(i.image_embed, x_T=i.x_T, steps=i.steps, guidance=i.guidance)` samples it again, with
    `guidance_interval=i.guidance_interval` if the inversion was given one.

    Args:
        x_T: float32 [B, C, S, S], the decoder's noise.
        image_embed: [B, D], CLIP's image embedding z.
        image: float32 [B, C, S, S] in [0, 1], the image at the decoder's size.
        steps: DDIM steps.
        guidance: the guidance scale.
        guidance_interval: (low, high) in log-SNR of the steps with guidance; None is all steps.
        prompt: the caption that the decoder was conditioned on.
        seconds: stage -> wall-clock seconds.
    """

    x_T: Tensor
    image_embed: Tensor
    image: Tensor
    steps: int
    guidance: float
    guidance_interval: tuple[float, float] | None
    prompt: str | None
    seconds: dict[str, float]

    @property
    def images(self) -> Tensor:
        """`image`, under the name that results of the other methods have."""
        return self.image


@torch.no_grad()
def invert(
    pipe: DALLE2,
    image: ImageInput,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    prompt: str | None = None,
    refine: int = 0,
    batch_size: int | None = None,
    progress: Progress = False,
) -> Inversion:
    """An image -> (z, x_T) by DDIM inversion, at the decoder's size.

    Args:
        image: as in `embed_image`.
        steps: DDIM steps, at least 2; decoding with the same steps, guidance and prompt comes the nearer to
            the image, the more there are.
        guidance: guidance scale; above 1 the inversion is less exact.
        guidance_interval: (low, high) in log-SNR, as in `generate`; None is the checkpoint's.
        prompt: a caption for the decoder; None leaves it out.
        refine: see GaussianDiffusion.invert.
        batch_size: as in `generate`.
        progress: as in `generate`.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.

    Source:
        unCLIP, arXiv 2204.06125, section 3.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> DALLE2.from_pretrained().invert(torch.rand(1, 3, 64, 64), steps=2).x_T.shape
        torch.Size([1, 3, 64, 64])
    """
    images = as_images("image", image, pipe.device)
    settings = resolve_settings(
        pipe, pipe.sizes[-1], steps=steps, guidance=guidance, guidance_interval=guidance_interval
    )
    embed = embed_image(pipe, images)
    small = resized(images, pipe.decoder.image_size)
    context = GenerationContext.for_inputs(
        pipe, len(images), 1, seed=0, batch_size=batch_size, progress=progress
    )
    with context.evaluation_mode():
        captions = encode_decoder_captions(context, prompt, len(images), settings)
        x_T = context.run(
            "inversion",
            pipe.decoder.invert,
            image=small,
            image_embed=embed,
            steps=steps,
            cond_scale=guidance,
            guidance_interval=settings.guidance_interval,
            refine=refine,
            **captions,
        )
    return Inversion(
        x_T, embed, small.float(), steps, guidance, settings.guidance_interval, prompt, context.timer.seconds
    )


def invert_for_decoding(
    pipe: DALLE2, images: Sequence[Tensor], steps: int | None, options: dict[str, Any]
) -> tuple[list[Inversion], dict[str, Any]]:
    """Invert each of `images` with the options of a `decode` that starts from their x_T.

    Returns the inversions and the options with which to decode; without steps no inversions, and the options
    unchanged. Guidance is 1 unless it is given, because with more some images are not sampled again
    (benchmarks/results/inversion.json).
    """
    if steps is None:
        return [], options
    if options.get("guidance") is None:
        options = options | {"guidance": 1.0}
    names = ("guidance", "guidance_interval", "prompt", "batch_size", "progress")
    shared = {name: options[name] for name in names if options.get(name) is not None}
    return [invert(pipe, image, steps=steps, **shared) for image in images], options


def add_seconds(generation: Generation, inversions: Sequence[Inversion]) -> Generation:
    """`generation` with the time of the inversions as the stage "inversion"."""
    if inversions:
        spent = sum(sum(inversion.seconds.values()) for inversion in inversions)
        generation.seconds = {"inversion": spent} | generation.seconds
    return generation
