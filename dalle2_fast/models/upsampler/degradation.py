"""Degradations of the condition of an upsampler, which make it robust to errors of the stage before it.

"blur" is a small Gaussian blur, as in unCLIP's first upsampler. "bsr" is blur, resampling, noise, sensor
noise and JPEG in random order, as in unCLIP's second upsampler, after the model of BSRGAN (Zhang et al.,
2103.14006). Every function maps images [B, C, H, W] in [0, 1] to the same shape and range on the same device.
All random numbers come from a generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.draws import batch_rows, batch_rows_are, draw
from dalle2_fast.models.upsampler.jpeg import jpeg
from dalle2_fast.ops._dtypes import compute_dtype

# The host chooses orders and sizes, once for each of this many parts of a batch.
_PARTS = 8


def gaussian_blur(
    images: Tensor,  # [B, C, H, W]
    kernel_size: int = 3,
    sigma: float = 0.6,
) -> Tensor:
    """Gaussian blur with reflected edges.

    Args:
        images: the images.
        kernel_size: side of the kernel in pixels, odd, at most 2 min(H, W) - 1.
        sigma: standard deviation of the kernel in pixels, > 0.

    Raises:
        ValueError: kernel_size is even, or sigma is not positive.

    Example:
        >>> gaussian_blur(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
    """
    if kernel_size < 1 or kernel_size % 2 == 0 or sigma <= 0:
        raise ValueError(
            f"kernel_size, sigma: expected an odd size and sigma > 0, got {kernel_size} and {sigma}"
        )
    offset = torch.arange(kernel_size, device=images.device, dtype=images.dtype) - kernel_size // 2
    row = torch.softmax(-offset.square() / (2 * sigma**2), dim=0)
    return _filter(images, (row[:, None] * row).expand(len(images), -1, -1))


def bsr(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Two blurs, resampling, noise, sensor noise and JPEG in a random order, each of random strength.

    The steps and ranges are those of BSRGAN, except for the widths of the blurs: they suit a condition at its
    own size and not the image that the upsampler makes, because unCLIP's degradations are slight. The
    strengths differ between images; the order and the resampling differ between up to eight parts of the
    batch. A quarter of the images get sensor noise, three quarters JPEG.

    Args:
        images: the images.
        generator: source of the random numbers; None is torch's default generator.

    Returns:
        Images of the same shape and dtype.

    Source: Zhang et al., "BSRGAN", 2103.14006, section 3.

    Example:
        >>> bsr(torch.rand(2, 3, 16, 16), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 16, 16])
    """
    if not len(images):
        return images
    dtype = images.dtype
    images = images.to(compute_dtype(dtype))  # half precision has not even 256 levels
    steps = (_random_blur, _random_blur, _random_noise, _sometimes(_random_sensor, 0.25),
             _sometimes(_random_jpeg, 0.75))
    first, total = batch_rows(len(images), generator)
    size = max(1, math.ceil(total / _PARTS))
    begins = range(0, total, size)
    # One copy to the host for all choices, so that the host waits for the device only once.
    choices = torch.rand(
        len(begins), 3 + len(steps) + 1, generator=generator, device=_device(images, generator)
    )
    results = []
    for begin, choice in zip(begins, choices.tolist(), strict=True):
        # Of the rows of this part, those that are here: perhaps none, but its numbers are drawn anyway.
        end = min(begin + size, total)
        low, high = (min(max(row - first, 0), len(images)) for row in (begin, end))
        part = images[low:high]
        resample = _resampling(0.5 + 0.5 * choice[0], *choice[1:3])
        ranks = zip(choice[3:], (resample, *steps), strict=True)
        with batch_rows_are(max(first, begin) - begin, end - begin, generator):
            for _, step in sorted(ranks, key=lambda rank: rank[0]):
                part = step(part, generator)
        results.append(part)
    return torch.cat(results).clamp(0, 1).to(dtype)


def _device(images: Tensor, generator: torch.Generator | None) -> torch.device:
    return images.device if generator is None else generator.device


def _uniform(low: float, high: float, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one number in [low, high) per image: [B, 1, 1, 1]."""
    uniform = draw(torch.rand, (len(images), 1, 1, 1), generator, device=_device(images, generator))
    return (low + (high - low) * uniform).to(images)


def _normal(shape: tuple[int, ...], images: Tensor, generator: torch.Generator | None) -> Tensor:
    return draw(torch.randn, shape, generator, device=_device(images, generator)).to(images)


def _sometimes(step: Callable[..., Tensor], probability: float) -> Callable[..., Tensor]:
    def chosen(images: Tensor, generator: torch.Generator | None) -> Tensor:
        hit = _uniform(0, 1, images, generator) < probability
        return torch.where(hit, step(images, generator), images)

    return chosen


def _filter(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter image b with kernels[b], kernels [B, K, K], with reflected edges."""
    batch, channels, height, width = images.shape
    if not batch:
        return images
    size = kernels.shape[-1]
    padded = F.pad(images, (size // 2,) * 4, mode="reflect").reshape(
        1, batch * channels, *(side + size - 1 for side in (height, width))
    )
    weight = kernels.repeat_interleave(channels, dim=0)[:, None]
    return F.conv2d(padded, weight, groups=batch * channels).view(batch, channels, height, width)


def _random_blur(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gaussian blur: isotropic for half of the images, of two widths at a random angle for the others."""
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
    """Resize to `factor` times the size and back; down and up in [0, 1) choose the filters."""
    modes = ("area", "bilinear", "bicubic")

    def resample(images: Tensor, generator: torch.Generator | None) -> Tensor:
        side = [max(1, round(side * factor)) for side in images.shape[-2:]]
        for size, choice in ((side, down), (images.shape[-2:], up)):
            mode = modes[int(choice * len(modes))]
            images = F.interpolate(images, size=tuple(size), mode=mode, antialias=mode != "area")
        return images.clamp(0, 1)

    return resample


def _random_noise(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gaussian noise with a standard deviation up to 25 / 255.

    It is independent per channel for two fifths of the images, grey for two fifths, and randomly correlated
    between the channels for one fifth.
    """
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
    """The noise of a camera, in linear light, with a variance that grows with the light.

    Images of three channels get it on a Bayer mosaic, whose missing colours are interpolated. The noise
    levels are the lower half of those of Brooks et al., 1811.11127, section 3.1.
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
    """Keep one colour of each pixel (RG over GB); the others become means of neighbours that kept them."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)[:, None] % 2
    columns = torch.arange(width, device=images.device) % 2
    kept = (rows + columns == torch.arange(3, device=images.device)[:, None, None]).to(images)
    weight = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], device=images.device, dtype=images.dtype)
    weight = weight.expand(3, 1, 3, 3)
    known = F.conv2d(kept[None], weight, padding=1, groups=3)
    # In an image of one pixel's width a pixel may have no neighbour with some colour.
    sums = F.conv2d(images * kept, weight, padding=1, groups=3)
    return torch.where(known > 0, sums / known.clamp(min=1), images)


def _random_jpeg(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """JPEG with a random quality in 30..95."""
    return jpeg(images, _uniform(30, 95, images, generator).flatten())


DEGRADATIONS = {"blur": lambda images, generator: gaussian_blur(images), "bsr": bsr}
