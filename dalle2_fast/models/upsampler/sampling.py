"""Sampling from an upsampler, whole or in tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle2_fast.data.images import check_images
from dalle2_fast.diffusion.graphs.plan import ConditionedNet, Net
from dalle2_fast.diffusion.progress import Progress
from dalle2_fast.functional import sample_noise
from dalle2_fast.models.distilled import resolve_sampler
from dalle2_fast.models.inputs import resolve_seeds
from dalle2_fast.models.unet.model import UNet
from dalle2_fast.models.upsampler.condition import enlarged, noised
from dalle2_fast.models.upsampler.tiles import tiles_for
from dalle2_fast.ops._dtypes import compute_dtype

if TYPE_CHECKING:
    from dalle2_fast.models.upsampler.model import Upsampler

# The Philox counter of the condition's noise: neither a step of a sampler nor the initial noise has it.
_CONDITION_NOISE_STEP = 2**31 - 2


@torch.no_grad()
def sample(
    upsampler: Upsampler,
    low_res: Tensor,  # [B, C, h, w] in [0, 1]
    *,
    seeds: Tensor | None = None,  # int64 [B]
    generator: torch.Generator | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    noise_level: float = 0.0,
    tile: int | None = None,
    overlap: int | None = None,
    progress: Progress = None,
    **sampler_options: Any,
) -> Tensor:
    """Sample large images for small ones.

    Args:
        upsampler: the upsampler.
        low_res: the small images.
        seeds: one per image; the same seed gives the same image in any batch. None draws them from
            `generator`.
        generator: source of the seeds; None is torch's default generator.
        steps: the number of steps; None is sample_timesteps.
        sampler: "ddpm", "ddim", "dpm++", or "consistency" for a distilled upsampler, whose default it is;
            None is "ddpm" for the others.
        noise_level: noise on the condition, 0 .. max_noise_level; the more noise, the more new detail.
        tile: side in pixels of the windows of the large image in which the U-Net runs, one window of one
            image at a time. None is sample_tile; a side that holds the whole image is one pass. The memory of
            the U-Net is then that of one window: for Karlo's net in float32 about 5 GB of activations for a
            tile of 512, 18 GB for a whole image of 1024 (estimated from the live tensors, without
            workspaces).
        overlap: pixels that neighbouring windows share; None is about a quarter of tile, see `Tiles`. Both
            are multiples of the factor by which the U-Net reduces the resolution.
        progress: see `GaussianDiffusion.sample`.
        sampler_options: more keywords of `GaussianDiffusion.sample` (eta, clip, dynamic_threshold, x_T,
            start, callback).

    Returns:
        Images [B, C, factor * h, factor * w] in [0, 1], float32 (float64 for float64 weights).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or value.
    """
    sampler, steps = resolve_sampler(upsampler, sampler, steps, sampler_options.get("spacing"))
    check_images("low_res", low_res, upsampler.channels)
    if not 0.0 <= noise_level <= upsampler.max_noise_level:
        raise ValueError(
            f"noise_level: expected a number in [0, max_noise_level] = [0, {upsampler.max_noise_level}], got "
            f"{noise_level}"
        )
    batch, _, height, width = low_res.shape
    height, width = height * upsampler.factor, width * upsampler.factor
    upsampler.check_size("low_res times the factor", height, width)
    weight = upsampler.unet.conv_in.weight
    dtype = compute_dtype(weight.dtype)
    seeds = resolve_seeds(seeds, batch, weight.device, generator)
    low_res, level = low_res.to(weight.device, dtype) * 2 - 1, None
    if upsampler.max_noise_level > 0:
        level = torch.full((batch,), noise_level, device=weight.device)
        noise = sample_noise(seeds, _CONDITION_NOISE_STEP, tuple(low_res.shape), dtype=dtype)
        low_res = noised(low_res, level, noise)
    condition = enlarged(low_res, upsampler.factor, upsampler.resize)
    tile = upsampler.sample_tile if tile is None else tile
    tiles = tiles_for(upsampler.unet, height, width, tile, overlap)

    def denoiser(unet: UNet) -> Net:
        if tiles is None:
            return ConditionedNet(_predict, (upsampler, unet), (condition, level))

        def predict(x: Tensor, condition: Tensor, t: Tensor, level: Tensor | None) -> Tensor:
            return upsampler.predict(unet, x, t, condition, level)

        return lambda x, t: tiles.run(predict, (t, level), x, condition)

    images = upsampler.diffusion.sample(
        denoiser(upsampler.unet), (batch, upsampler.channels, height, width),
        last_net=None if upsampler.last_unet is None else denoiser(upsampler.last_unet), seeds=seeds,
        sampler=sampler, steps=steps, progress=progress, device=weight.device, dtype=dtype,
        **sampler_options,
    )  # fmt: skip
    return ((images + 1) / 2).clamp(0, 1)


def _predict(
    upsampler: Upsampler, unet: UNet, x: Tensor, t: Tensor, condition: Tensor, level: Tensor | None
) -> Tensor:
    return upsampler.predict(unet, x, t, condition, level)
