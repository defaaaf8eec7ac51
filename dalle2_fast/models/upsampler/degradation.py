"""Corruptions of an upsampler's condition, so that it forgives what the stage before it gets wrong.

"blur": a small Gaussian blur, unCLIP's first upsampler. "bsr": blur, resampling, noise, sensor noise and JPEG
in random order, unCLIP's second upsampler, after BSRGAN's model (Zhang et al. 2021, arXiv 2103.14006).
Every function maps images [B, C, H, W] in [0, 1] to the same shape and range, on their device; a generator
decides everything random.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.models.upsampler.jpeg import jpeg
from dalle2_fast.ops._dtypes import compute_dtype

# Orders and sizes are choices of the host, drawn anew for each of so many parts of a batch.
_PARTS = 8


def gaussian_blur(
    images: Tensor,  # [B, C, H, W]
    kernel_size: int = 3,
    sigma: float = 0.6,
) -> Tensor:
    """Separable Gaussian blur with reflected edges; kernel_size odd and at most 2 min(H, W) - 1."""
    if kernel_size < 1 or kernel_size % 2 == 0 or sigma <= 0:
        raise ValueError(
            f"kernel_size, sigma: expected an odd size and sigma > 0, got {kernel_size} and {sigma}"
        )
    offset = torch.arange(kernel_size, device=images.device, dtype=images.dtype) - kernel_size // 2
    row = torch.softmax(-offset.square() / (2 * sigma**2), dim=0)
    return _filter(images, (row[:, None] * row).expand(len(images), -1, -1))


def bsr(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Two blurs, resampling, noise, sensor noise and JPEG in a random order, each of random strength.

    BSRGAN's steps and ranges, except that blurs are as wide as befits a condition at its own size and not the
    image that is to be made: unCLIP's corruptions are slight. Strengths differ for each image, the order and
    the resampling for each of up to eight parts of the batch. Sensor noise meets a quarter of the images,
    JPEG three quarters.
    """
    if not len(images):
        return images
    dtype = images.dtype
    images = images.to(compute_dtype(dtype))  # half precision has not even 256 levels
    steps = (_random_blur, _random_blur, _random_noise, _sometimes(_random_sensor, 0.25),
             _sometimes(_random_jpeg, 0.75))
    parts = images.split(max(1, math.ceil(len(images) / _PARTS)))
    # One wait for the device, however many choices.
    draws = torch.rand(len(parts), 3 + len(steps) + 1, generator=generator, device=_device(images, generator))
    results = []
    for part, draw in zip(parts, draws.tolist(), strict=True):
        resample = _resampling(0.5 + 0.5 * draw[0], *draw[1:3])
        ranks = zip(draw[3:], (resample, *steps), strict=True)
        for _, step in sorted(ranks, key=lambda rank: rank[0]):
            part = step(part, generator)
        results.append(part)
    return torch.cat(results).clamp(0, 1).to(dtype)


def _device(images: Tensor, generator: torch.Generator | None) -> torch.device:
    return images.device if generator is None else generator.device


def _uniform(low: float, high: float, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """One number in [low, high) per image: [B, 1, 1, 1]."""
    draw = torch.rand(len(images), 1, 1, 1, generator=generator, device=_device(images, generator))
    return (low + (high - low) * draw).to(images)


def _normal(shape: tuple[int, ...], images: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, device=_device(images, generator)).to(images)


def _sometimes(step: Callable[..., Tensor], probability: float) -> Callable[..., Tensor]:
    def chosen(images: Tensor, generator: torch.Generator | None) -> Tensor:
        hit = _uniform(0, 1, images, generator) < probability
        return torch.where(hit, step(images, generator), images)

    return chosen


def _filter(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter image b with kernels[b], kernels [B, K, K], edges reflected."""
    batch, channels, height, width = images.shape
    size = kernels.shape[-1]
    padded = F.pad(images, (size // 2,) * 4, mode="reflect").reshape(
        1, batch * channels, *(side + size - 1 for side in (height, width))
    )
    weight = kernels.repeat_interleave(channels, dim=0)[:, None]
    return F.conv2d(padded, weight, groups=batch * channels).view(batch, channels, height, width)


def _random_blur(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gaussian blur, for half of the images of one width, for half of two at a random angle."""
    size = min(7, 2 * min(images.shape[-2:]) - 1)
    offset = torch.arange(size, device=images.device, dtype=images.dtype) - size // 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    angle = _uniform(0, math.pi, images, generator)[:, 0]
    wide, narrow = (_uniform(0.2, 1.6, images, generator)[:, 0] for _ in range(2))
    round_one = _uniform(0, 1, images, generator)[:, 0] < 0.5
    narrow = torch.where(round_one, wide, narrow)
    along, across = angle.cos() * x + angle.sin() * y, -angle.sin() * x + angle.cos() * y
    exponent = -0.5 * ((along / wide).square() + (across / narrow).square())
    return _filter(images, torch.softmax(exponent.flatten(1), dim=1).unflatten(1, (size, size)))


def _resampling(factor: float, down: float, up: float) -> Callable[..., Tensor]:
    """To `factor` times the size and back; down and up in [0, 1) choose the filters."""
    modes = ("area", "bilinear", "bicubic")

    def resample(images: Tensor, generator: torch.Generator | None) -> Tensor:
        side = [max(1, round(side * factor)) for side in images.shape[-2:]]
        for size, choice in ((side, down), (images.shape[-2:], up)):
            mode = modes[int(choice * len(modes))]
            images = F.interpolate(images, size=tuple(size), mode=mode, antialias=mode != "area")
        return images.clamp(0, 1)

    return resample


def _random_noise(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gaussian noise of a deviation up to 25 / 255: of each channel (2 of 5 images), grey (2 of 5), or with
    random correlations between the channels."""
    batch, channels = images.shape[:2]
    noise = _normal(tuple(images.shape), images, generator)
    kind = _uniform(0, 1, images, generator)[:, 0]
    grey = torch.zeros(channels, channels, device=images.device, dtype=images.dtype)
    grey[:, 0] = 1
    mixed = F.normalize(_normal((batch, channels, channels), images, generator), dim=-1)
    mixing = torch.where(kind < 0.4, torch.eye(channels, device=images.device, dtype=images.dtype), mixed)
    mixing = torch.where(kind >= 0.6, grey, mixing)
    noise = torch.einsum("bij,bjhw->bihw", mixing, noise)
    return (images + noise * _uniform(1 / 255, 25 / 255, images, generator)).clamp(0, 1)


def _random_sensor(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """A camera's noise: in linear light with a variance that grows with it, on a Bayer mosaic (for three
    channels) whose missing colours are interpolated.

    The noise levels are the lower half of those of Brooks et al. 2019, arXiv 1811.11127, section 3.1.
    """
    shot = torch.exp(_uniform(math.log(1e-4), math.log(4e-3), images, generator))
    read = torch.exp(2.18 * shot.log() + 1.2)
    linear = images.clamp(0, 1) ** 2.2
    noise = _normal(tuple(images.shape), images, generator)
    linear = linear + noise * (shot * linear + read).sqrt()
    if images.shape[1] == 3:
        linear = _mosaic(linear)
    return linear.clamp(0, 1) ** (1 / 2.2)


def _mosaic(images: Tensor) -> Tensor:
    """Of each pixel one colour is kept (RG over GB); the others are means of neighbours that kept them."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)[:, None] % 2
    columns = torch.arange(width, device=images.device) % 2
    kept = (rows + columns == torch.arange(3, device=images.device)[:, None, None]).to(images)
    weight = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], device=images.device, dtype=images.dtype)
    weight = weight.expand(3, 1, 3, 3)
    known = F.conv2d(kept[None], weight, padding=1, groups=3)
    # The edge of a picture one pixel wide may know no neighbour of a colour at all.
    sums = F.conv2d(images * kept, weight, padding=1, groups=3)
    return torch.where(known > 0, sums / known.clamp(min=1), images)


def _random_jpeg(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """JPEG of a random quality in 30..95."""
    return jpeg(images, _uniform(30, 95, images, generator).flatten())


DEGRADATIONS = {"blur": lambda images, generator: gaussian_blur(images), "bsr": bsr}
