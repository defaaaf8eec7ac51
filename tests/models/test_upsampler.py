"""The upsampler: condition, crops, when the condition is corrupted, sampling of any size."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast.models.upsampler import model
from dalle2_fast.models.upsampler.crops import random_crops
from dalle2_fast.models.upsampler.degradation import gaussian_blur
from dalle2_fast.models.upsampler.model import Upsampler

UNET = dict(
    in_channels=6,
    out_channels=3,
    channels=(16, 16),
    layers_per_block=1,
    attention_levels=(),
    patch_size=4,
    num_groups=8,
    film=False,
    cross_dim=None,
)


def small_upsampler(unet: dict | None = None, **options) -> Upsampler:
    torch.manual_seed(0)
    upsampler = Upsampler(UNET | (unet or {}), **dict(image_size=32, low_res_size=8) | options)
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return upsampler


def fixed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(size: int = 32, batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=fixed(1))


def test_default_size_is_karlos():
    with torch.device("meta"):
        upsampler = Upsampler()
    assert sum(parameter.numel() for parameter in upsampler.parameters()) == 691_579_523


def test_config_rebuilds_the_same_upsampler():
    upsampler = small_upsampler(dict(class_embed_dim=8), degradation="bsr", max_noise_level=0.4, timesteps=30)
    again = Upsampler(**json.loads(json.dumps(upsampler.config)))
    again.load_state_dict(upsampler.state_dict())
    assert torch.equal(again(images(), generator=fixed()), upsampler(images(), generator=fixed()))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_gradients_reach_every_parameter(noise):
    upsampler = small_upsampler(dict(class_embed_dim=8) if noise else {}, max_noise_level=noise)
    upsampler(images(), generator=fixed()).backward()
    silent = [n for n, p in upsampler.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_condition_matters_in_training_and_sampling():
    upsampler = small_upsampler()
    low = images(8)
    base, other = (upsampler(images(), x, generator=fixed()) for x in (low, low.flip(0)))
    assert not torch.isclose(base, other, rtol=1e-4)
    seeds = torch.arange(3)
    base, other = (upsampler.sample(x, seeds=seeds, steps=2) for x in (low, low.flip(0)))
    assert ((base - other).abs().amax((1, 2, 3)) > 1e-3)[[0, 2]].all()


def test_low_res_is_made_from_the_image_when_not_given():
    upsampler = small_upsampler()
    small = F.interpolate(images(), (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(
        upsampler(images(), generator=fixed()), upsampler(images(), small, generator=fixed())
    )


def test_crop_is_a_window_of_image_and_condition_alike():
    """An image whose pixels are their own coordinates shows where each window was cut."""
    upsampler = small_upsampler(degradation=None)
    row = torch.arange(32.0)
    coordinates = torch.stack([row[:, None].expand(32, 32), row.expand(32, 32)]).expand(5, 2, 32, 32)
    first, second = random_crops(16, 8, fixed(), coordinates, coordinates * 2)
    assert first.shape == (5, 2, 16, 16) and torch.equal(second, first * 2)
    corner = first[:, :, :1, :1]
    assert torch.equal(first - corner, coordinates[:, :, :16, :16])
    assert len(corner.flatten(1).unique(dim=0)) > 1  # each image has its own window

    seen = []
    upsampler.unet.conv_in.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    upsampler(images(), crop=16, generator=fixed()).backward()
    upsampler(images(), crop=0.25, generator=fixed())  # the paper's quarter of the side
    assert seen == [(3, 96, 4, 4), (3, 96, 2, 2)]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_same_seed_same_picture_whatever_the_batch(sampler):
    upsampler = small_upsampler(dict(class_embed_dim=8), max_noise_level=0.5)
    low, seeds = images(8), torch.tensor([4, 5, 6])
    options = dict(steps=3, sampler=sampler, noise_level=0.3)
    together = upsampler.sample(low, seeds=seeds, **options)
    assert together.shape == (3, 3, 32, 32) and 0 <= together.min() and together.max() <= 1
    alone = upsampler.sample(low[1:2], seeds=seeds[1:2], **options)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=0)
    clean = upsampler.sample(low, seeds=seeds, **options | dict(noise_level=0.0))
    assert (clean - together).abs().max() > 1e-3


def test_any_size_of_condition():
    upsampler = small_upsampler()
    assert upsampler.sample(images(8)[..., :6], steps=1).shape == (3, 3, 32, 24)


def test_residual_starts_at_the_enlarged_condition():
    """Untrained, a residual upsampler must return the plain enlargement."""
    upsampler = Upsampler(UNET, image_size=32, low_res_size=8, prediction="sample", residual=True)
    low = images(8)
    expected = F.interpolate(low, scale_factor=4, mode="bilinear")
    torch.testing.assert_close(upsampler.sample(low, steps=2, sampler="ddim"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_degradation_probability(probability, monkeypatch):
    """0 leaves the condition alone, 1 corrupts every one of them."""
    upsampler = small_upsampler(degradation_prob=probability)
    seen = []
    enlarged = model.enlarged
    monkeypatch.setattr(model, "enlarged", lambda low, *how: seen.append(low) or enlarged(low, *how))
    upsampler(images(), images(8), generator=fixed())
    expected = gaussian_blur(images(8)) if probability else images(8)
    torch.testing.assert_close(seen[0], expected * 2 - 1)


@pytest.mark.parametrize("degradation", ["blur", "bsr"])
def test_autocast_leaves_the_condition_its_levels(degradation, monkeypatch):
    """Catches: a blur or JPEG computed in bfloat16, in which 256 levels are not 256."""
    upsampler = small_upsampler(degradation=degradation, degradation_prob=1.0)
    seen = []
    enlarged = model.enlarged
    monkeypatch.setattr(model, "enlarged", lambda low, *how: seen.append(low) or enlarged(low, *how))
    upsampler(images(), generator=fixed())
    with torch.autocast("cpu", torch.bfloat16):
        upsampler(images(), generator=fixed())
    assert torch.equal(*seen)


def test_wrong_inputs_are_named():
    upsampler = small_upsampler()
    with pytest.raises(ValueError, match="image: expected height and width .* multiples of 8, got 36 x 36"):
        upsampler(images(36))
    with pytest.raises(ValueError, match=r"low_res: expected \[B, 3, H, W\] with H, W = 8, 8 and B = 3, got"):
        upsampler(images(), images(16))
    with pytest.raises(ValueError, match="crop: expected a multiple of 8 up to 32, got 12"):
        upsampler(images(), crop=12)
    with pytest.raises(ValueError, match="crop: expected a multiple of 8 up to 32, got 40"):
        upsampler(images(), crop=40)
    with pytest.raises(ValueError, match=r"crop: expected a part of the side in \(0, 1\], .*, got 1.5"):
        upsampler(images(), crop=1.5)
    with pytest.raises(ValueError, match=r"low_res: expected values in \[0, 1\], got"):
        upsampler.sample(images(8) * 2 - 1)
    with pytest.raises(ValueError, match=r"noise_level: expected a number in .* = \[0, 0.0\]"):
        upsampler.sample(images(8), noise_level=0.1)
    with pytest.raises(ValueError, match="low_res times the factor: expected height and width"):
        upsampler.sample(images(9))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(image_size=30), "image_size: expected a multiple of low_res_size = 8"),
        (dict(degradation="fog"), "degradation: expected one of blur, bsr or None, got 'fog'"),
        (dict(max_noise_level=0.5), "expected a unet with a class_embed_dim exactly if"),
        (dict(variance="learned_range"), "out_channels = 6 for variance='learned_range', got 6 and 3"),
        (dict(resize="cubic"), 'resize: expected "bilinear" or "bicubic", got \'cubic\''),
        (dict(residual=True), 'residual: expected prediction="sample"'),
    ],
)
def test_impossible_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small_upsampler(**options)
