"""What the principal components of CLIP's image embedding hold: unCLIP, section 4."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle2_fast.data import SceneStream, World
from dalle2_fast.data.images import as_images, expect_one
from dalle2_fast.models.prior.pca import PCA
from dalle2_fast.pipeline.context import Generation
from dalle2_fast.pipeline.decoding import decode, embed_image
from dalle2_fast.pipeline.settings import check_count

if TYPE_CHECKING:
    from dalle2_fast.pipeline.dalle2 import DALLE2
    from dalle2_fast.pipeline.decoding import ImageInput


def reconstruct(
    pipe: DALLE2, image: ImageInput, dims: Sequence[int], pca: PCA, **options: Any
) -> Generation:
    """An image from the first components of its z: one image per number in `dims`, all from the same x_T.

    Args:
        image: one image, as in `embed_image`.
        dims: numbers of components, each 0 (the mean embedding) ... D (all of z).
        pca: the components, see `fit_pca`.
        options: those of `decode`.

    Raises:
        TypeError, ValueError: no or several images, no dims, dims out of range, components of another width.

    Source:
        unCLIP, arXiv 2204.06125, section 4 and figure 7.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> pipe = DALLE2.from_pretrained()
        >>> pca = pipe.fit_pca([torch.rand(16, 3, 64, 64)])
        >>> pipe.reconstruct(torch.rand(3, 64, 64), [1, 192], pca, steps=2, size=64).images.shape
        torch.Size([2, 3, 64, 64])
    """
    embed = embed_image(pipe, expect_one("image", as_images("image", image, pipe.device)))
    if len(pca.mean) != embed.shape[1]:
        raise ValueError(f"pca: expected components of {embed.shape[1]} numbers, got {len(pca.mean)}")
    if not len(dims):
        raise ValueError("dims: expected at least one number of components, got none")
    return decode(pipe, torch.cat([pca.truncate(embed, count) for count in dims]), **options)


def fit_pca(
    pipe: DALLE2,
    images: Iterable[Tensor] | None = None,
    *,
    count: int = 2048,
    seed: int = 0,
    batch_size: int = 64,
) -> PCA:
    """Principal components of image embeddings.

    Args:
        images: batches [B, 3, S, S] in [0, 1], all of which are used. None: images of the world that the
            checkpoint was trained on (metadata["world"]).
        count: number of images of that world, at least 1.
        seed: of those images.
        batch_size: of those images.

    Raises:
        ValueError: no batch, or None for a checkpoint that names no world.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> DALLE2.from_pretrained().fit_pca(count=8).components.shape
        torch.Size([192, 192])
    """
    if images is None:
        images = world_images(pipe, check_count("count", count), seed, batch_size)
    with torch.no_grad():
        embeds = [embed_image(pipe, batch).cpu().double() for batch in images]
    if not embeds:
        raise ValueError("images: expected at least one batch, got none")
    return PCA.fit(torch.cat(embeds), unit_norm=pipe.decoder.unit_norm)


def world_images(pipe: DALLE2, count: int, seed: int, batch_size: int) -> Iterable[Tensor]:
    """Batches of `count` images of the world that the checkpoint was trained on; ValueError without one."""
    if pipe.metadata.get("world") is None:
        raise ValueError("images: expected batches, because the checkpoint names no world, got None")
    size = pipe.clip.image_size
    stream = SceneStream(World.from_config(pipe.metadata["world"]), batch_size, (size,), seed)
    for step in range(-(-count // batch_size)):
        yield stream.batch(step)["images"][size][: count - step * batch_size].to(pipe.device)
