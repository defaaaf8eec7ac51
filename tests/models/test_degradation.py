"""Corruptions of the condition: the blur, JPEG against Pillow's, noise, and their random order."""

from __future__ import annotations

import io

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dalle2_fast.models.upsampler import degradation
from dalle2_fast.models.upsampler.degradation import bsr, gaussian_blur
from dalle2_fast.models.upsampler.jpeg import jpeg


def fixed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 20, width: int = 28, batch: int = 4, channels: int = 3) -> torch.Tensor:
    coarse = torch.rand(batch, channels, height // 5, width // 5, generator=fixed())
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def test_gaussian_blur_is_the_formula():
    weights = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) / (2 * 0.6**2))
    weights /= weights.sum()
    point = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    point[0, 1, 2, 2] = 1.0
    blurred = gaussian_blur(point)
    torch.testing.assert_close(blurred[0, 1, 1:4, 1:4], weights[:, None] * weights)
    assert not blurred[0, 0].any()
    flat = torch.full((2, 3, 8, 8), 0.25)
    torch.testing.assert_close(gaussian_blur(flat), flat)
    with pytest.raises(ValueError, match="kernel_size, sigma: expected an odd size"):
        gaussian_blur(flat, 4)


def test_bsr_is_reproducible_in_range_and_moderate():
    clean = picture()
    for seed in range(6):
        degraded = bsr(clean, fixed(seed))
        assert torch.equal(degraded, bsr(clean, fixed(seed)))
        assert degraded.shape == clean.shape and 0 <= degraded.min() and degraded.max() <= 1
        error = (degraded - clean).square().mean().sqrt()
        assert 1e-3 < error < 0.2


def test_bsr_differs_from_image_to_image_and_order_to_order():
    """Catches: one strength or one order for a whole batch, or for every batch."""
    same = picture(batch=1).expand(16, -1, -1, -1)
    degraded = bsr(same, fixed())
    assert len(degraded.flatten(1).unique(dim=0)) == 16
    state = torch.random.get_rng_state()
    bsr(same, fixed())
    assert torch.equal(torch.random.get_rng_state(), state)  # the generator decides everything
    torch.manual_seed(3)
    first = bsr(same)
    torch.manual_seed(3)
    assert torch.equal(bsr(same), first)


def test_bsr_takes_every_step_in_any_order(monkeypatch):
    names = ("_random_blur", "_random_noise", "_random_sensor", "_random_jpeg")
    seen = []
    for name in names:
        monkeypatch.setattr(degradation, name, lambda images, _, name=name: seen.append(name) or images)
    inner = degradation._resampling
    monkeypatch.setattr(degradation, "_resampling", lambda *how: lambda images, generator: (
        seen.append("resample") or inner(*how)(images, generator)))
    bsr(picture(batch=8), fixed())
    runs = [tuple(seen[i : i + 6]) for i in range(0, len(seen), 6)]
    assert len(runs) == 8 and len(set(runs)) > 4
    for run in runs:
        assert sorted(run) == sorted(["_random_blur", "resample", *names])
    assert len({run[0] for run in runs}) > 2 and len({run[-1] for run in runs}) > 2


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (1, 3, 3, 5), (3, 5, 9, 8), (1, 3, 1, 1), (0, 3, 8, 8)])
def test_bsr_of_any_shape(shape):
    images = torch.rand(shape, generator=fixed())
    for seed in range(3):
        degraded = bsr(images, fixed(seed))
        assert degraded.shape == shape and degraded.isfinite().all()
    assert bsr(images.double(), fixed()).dtype == torch.float64
    assert bsr(images.bfloat16(), fixed()).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------- JPEG


def pillow_jpeg(image: torch.Tensor, quality: int, subsampling: int) -> torch.Tensor:
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return torch.from_numpy(numpy.array(Image.open(file))).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("subsample", [False, True])
@pytest.mark.parametrize("quality", [10, 30, 49, 50, 75])
def test_jpeg_is_pillows(quality, subsample):
    """Catches: a table transposed or wrongly scaled, chroma by the table of luma, blocks out of order, chroma
    half a pixel aside. What is left is libjpeg's integer arithmetic: it flips a rounding here and there."""
    image = (picture(53, 70, batch=1) + 0.03 * torch.randn(1, 3, 53, 70, generator=fixed())).clamp(0, 1)
    image = (image * 255).round() / 255
    expected = pillow_jpeg(image[0], quality, 2 if subsample else 0)
    error = (jpeg(image, quality, subsample)[0] - expected).abs().mean()
    lost = (image[0] - expected).abs().mean()
    assert error < 0.12 * lost
    assert error * 255 < 1.0 + 0.5 * subsample


def test_jpeg_quality_of_each_image():
    images = picture(batch=3)
    qualities = torch.tensor([10.0, 50.0, 95.0])
    together = jpeg(images, qualities)
    for i, quality in enumerate(qualities.tolist()):
        torch.testing.assert_close(together[i : i + 1], jpeg(images[i : i + 1], quality))
    errors = (together - images).square().mean(dim=(1, 2, 3))
    assert errors[0] > errors[1] > errors[2]
    levels = together * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"quality: expected a number in \[1, 100\], got 0"):
        jpeg(images, 0)


# ---------------------------------------------------------------------------------------------------- noise


def test_noise_is_white_grey_or_mixed():
    """Of 1000 images two fifths are grey, two fifths independent, the rest in between; all equally strong."""
    flat = torch.full((1000, 3, 12, 12), 0.5)
    noise = degradation._random_noise(flat, fixed()) - flat
    deviation = noise.std(dim=(2, 3))
    assert deviation.max() < 30 / 255 and deviation.mean() == pytest.approx(13 / 255, rel=0.1)
    unit = F.normalize((noise - noise.mean(dim=(2, 3), keepdim=True)).flatten(2), dim=-1)
    correlation = (unit @ unit.transpose(1, 2))[:, 0, 1]
    grey, white = correlation > 0.999, correlation.abs() < 0.3
    assert grey.float().mean() == pytest.approx(0.4, abs=0.05)
    assert 0.4 < white.float().mean() < 0.6  # the independent ones, and of the mixed ones those that are near


def test_sensor_noise_grows_with_light_and_runs_across_pixels():
    """Catches: noise added to the image instead of the light; a mosaic that is not interpolated."""
    values = torch.tensor([0.2, 0.8])
    flat = values[:, None, None, None].expand(2, 3, 96, 96).repeat(64, 1, 1, 1)
    noisy = degradation._random_sensor(flat, fixed())
    light = (noisy.double() ** 2.2).unflatten(0, (64, 2))
    deviation = light[..., 4:-4, 4:-4].std(dim=(2, 3, 4)).mean(dim=0)
    assert deviation[1] > 2 * deviation[0]  # shot noise: as the square root of 21 times the light
    centred = light[:, 1] - light[:, 1].mean(dim=(2, 3), keepdim=True)
    neighbours = (centred[..., 1:] * centred[..., :-1]).mean() / centred.square().mean()
    assert neighbours > 0.2
    torch.testing.assert_close(noisy.mean(dim=(0, 2, 3)), flat.mean(dim=(0, 2, 3)), rtol=0, atol=0.01)


def test_mosaic_keeps_what_it_knows_and_flat_colours():
    colours = torch.tensor([0.1, 0.5, 0.9])[None, :, None, None].expand(1, 3, 7, 6)
    torch.testing.assert_close(degradation._mosaic(colours), colours)
    images = torch.rand(1, 3, 6, 6, generator=fixed())
    seen = degradation._mosaic(images)
    assert torch.allclose(seen[0, 0, ::2, ::2], images[0, 0, ::2, ::2])
    assert torch.allclose(seen[0, 2, 1::2, 1::2], images[0, 2, 1::2, 1::2])
    assert torch.allclose(seen[0, 1, 2, 2], images[0, 1, [1, 2, 2, 3], [2, 1, 3, 2]].mean())


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_the_gpu_by_a_generator_of_either_device(device):
    images = picture().cuda()
    first, again = (bsr(images, torch.Generator(device).manual_seed(1)) for _ in range(2))
    assert first.device.type == "cuda" and torch.equal(first, again)
    if device == "cpu":  # the same random numbers, the same image, except where JPEG rounds differently
        assert (first.cpu() - bsr(images.cpu(), fixed(1))).abs().mean() < 0.02
