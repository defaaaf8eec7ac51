"""Corruptions of an upsampler's condition, so that it forgives what the stage before it gets wrong.

"blur": a small Gaussian blur, unCLIP's first upsampler. "bsr": blur, resampling, noise and JPEG-like
quantisation in random order, a compact form of BSRGAN's model (Zhang et al. 2021, arXiv 2103.14006), unCLIP's
second upsampler. Every function maps images [B, C, H, W] in [0, 1] to the same shape and range.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ITU-T T.81, annex K.1: the luminance table of JPEG.
_JPEG_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


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
    """Random blur, resampling, noise and JPEG quantisation, in a random order; strengths differ per image."""
    steps = (_random_blur, _random_resample, _random_noise, _random_jpeg)
    order = torch.randperm(len(steps), generator=generator, device=_device(generator)).tolist()
    for index in order:
        images = steps[index](images, generator)
    return images


def _device(generator: torch.Generator | None) -> torch.device | str:
    return generator.device if generator is not None else "cpu"


def _uniform(low: float, high: float, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """One number in [low, high) per image: [B, 1, 1, 1]."""
    draw = torch.rand(len(images), 1, 1, 1, generator=generator, device=_device(generator))
    return (low + (high - low) * draw).to(images)


def _filter(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter image b with kernels[b], kernels [B, K, K], edges reflected."""
    batch, channels, height, width = images.shape
    size = kernels.shape[-1]
    padded = F.pad(images, (size // 2,) * 4, mode="reflect").reshape(
        1, batch * channels, *(side + size - 1 for side in (height, width))
    )
    weight = kernels.repeat_interleave(channels, dim=0)[:, None]
    return F.conv2d(padded, weight, groups=batch * channels).view(batch, channels, height, width)


def _random_blur(images: Tensor, generator: torch.Generator | None, size: int = 7) -> Tensor:
    """Gaussian blur of random width in two directions and random angle."""
    offset = torch.arange(size, device=images.device, dtype=images.dtype) - size // 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    angle = _uniform(0, math.pi, images, generator)[:, 0]
    wide, narrow = (_uniform(0.2, 1.6, images, generator)[:, 0] for _ in range(2))
    along, across = angle.cos() * x + angle.sin() * y, -angle.sin() * x + angle.cos() * y
    exponent = -0.5 * ((along / wide).square() + (across / narrow).square())
    return _filter(images, torch.softmax(exponent.flatten(1), dim=1).unflatten(1, (size, size)))


def _random_resample(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Down by one random factor for the batch, and back, each with a random filter."""
    draw = torch.rand(3, generator=generator, device=_device(generator)).tolist()
    modes = ("area", "bilinear", "bicubic")
    side = [max(1, round(side * (0.5 + 0.5 * draw[0]))) for side in images.shape[-2:]]
    for size, choice in ((side, draw[1]), (images.shape[-2:], draw[2])):
        mode = modes[int(choice * len(modes))]
        images = F.interpolate(images, size=tuple(size), mode=mode, antialias=mode != "area")
    return images.clamp(0, 1)


def _random_noise(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gaussian noise of random strength, per channel or, for half of the images, grey."""
    shape = tuple(images.shape)
    noise = torch.randn(shape, generator=generator, device=_device(generator)).to(images)
    grey = _uniform(0, 1, images, generator) < 0.5
    noise = torch.where(grey, noise[:, :1], noise)
    return (images + noise * _uniform(0, 25 / 255, images, generator)).clamp(0, 1)


def _random_jpeg(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Quantised 8 x 8 cosine coefficients at a random quality in 30..95, per channel, full chroma."""
    height, width = images.shape[-2:]
    quality = _uniform(30, 95, images, generator)[..., None, None]
    # The scaling of the table by quality is libjpeg's.
    strength = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100
    table = torch.tensor(_JPEG_TABLE, device=images.device, dtype=images.dtype)
    step = (table * strength).clamp(1, 255) / 255

    frequency = torch.arange(8, device=images.device, dtype=images.dtype)
    basis = torch.cos(math.pi / 8 * (frequency + 0.5) * frequency[:, None]) / 2
    basis[0] /= math.sqrt(2)  # now orthonormal: rows are frequencies

    padded = F.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [B, C, H/8, W/8, 8, 8]
    coefficients = basis @ (blocks - 0.5) @ basis.T
    blocks = basis.T @ ((coefficients / step).round() * step) @ basis + 0.5
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., :height, :width].clamp(0, 1)


DEGRADATIONS = {"blur": lambda images, generator: gaussian_blur(images), "bsr": bsr}
