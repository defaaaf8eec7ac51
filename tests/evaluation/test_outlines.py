"""Outline scores and denoising scores. Each test names the fault it would catch."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast.data.synthetic.palette import palette
from dalle2_fast.data.synthetic.rendering import render
from dalle2_fast.data.synthetic.scenes import sample_scenes
from dalle2_fast.data.synthetic.vocabulary import SHAPES
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.evaluation.denoising import denoise_once
from dalle2_fast.evaluation.outlines import outline_iou, score_outlines
from dalle2_fast.evaluation.psnr import psnr
from dalle2_fast.models import Decoder

LARGE = dict(fills=["solid"], sizes=["large"], textures=["plain"], kinds=["one"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def large(shape: str, count: int):
    return sample_scenes(count, generator(1), "all", World(shapes=[shape], **LARGE))


def drawn(distance: torch.Tensor) -> torch.Tensor:
    """A red object on white, [1, 3, 64, 64], from its signed distance in pixels."""
    coverage = (0.5 - distance).clamp(0, 1)
    red, white = (table[0][:, None, None] for table in (palette().color, palette().background))
    return (red * coverage + white * (1 - coverage))[None]


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.arange(64) + 0.5
    return axis[None].expand(64, 64) - 31.2, axis[:, None].expand(64, 64) - 33.1


@pytest.mark.parametrize("shape", SHAPES)
def test_renders_are_the_ceiling(shape):
    """Catches: a fit that misses the place, size or rotation, or light and shadow taken for the object."""
    scenes = large(shape, 8)
    iou = outline_iou(render(scenes, 64), scenes["shape"][:, 0])
    assert iou.min() > 0.94 and iou.mean() > 0.98


def test_facets_and_round_corners_cost():
    """Catches: a score that does not see what is wrong with the outlines of a blurry decoder."""
    x, y = pixels()
    radius, angle = (x * x + y * y).sqrt(), torch.atan2(x, y)
    sector = 2 * torch.pi / 7
    heptagon = radius * torch.cos(angle - sector * torch.round(angle / sector)) - 13
    circle = torch.tensor([SHAPES.index("circle")])
    round_iou, facet_iou = (outline_iou(drawn(d), circle).item() for d in (radius - 13.5, heptagon))
    assert round_iou > 0.99 and facet_iou < round_iou - 0.02

    def box(corner: float):
        dx, dy = x.abs() - 12 + corner, y.abs() - 12 + corner
        outside = (dx.clamp_min(0) ** 2 + dy.clamp_min(0) ** 2).sqrt()
        return outside + torch.maximum(dx, dy).clamp_max(0) - corner

    square = torch.tensor([SHAPES.index("square")])
    sharp_iou, loaf_iou, round_loaf_iou = (outline_iou(drawn(box(c)), square).item() for c in (0.0, 5.0, 9.0))
    assert sharp_iou > 0.99 and loaf_iou < sharp_iou - 0.02 and round_loaf_iou < loaf_iou - 0.03


def test_another_shape_and_no_object():
    """Catches: a wrong shape that scores as the right one, and an exception or a score for an empty image."""
    scenes = large("star", 4)
    images, star = render(scenes, 64), scenes["shape"][:, 0]
    assert outline_iou(images, torch.zeros_like(star)).max() < 0.8
    empty = torch.cat([images[:1], torch.full((2, 3, 64, 64), 0.5), images[1:]])
    iou = outline_iou(empty, star[0].expand(6))
    assert iou[1] == iou[2] == 0 and torch.equal(iou[[0, 3, 4, 5]], outline_iou(images, star))
    assert outline_iou(empty[1:3], star[:2]).tolist() == [0, 0]
    assert outline_iou(images[:0], star[:0]).shape == (0,)


def test_scores_by_shape():
    """Catches: images that are compared with the captions of other images, and a mean over too few shapes."""
    world = World(shapes=["circle", "star", "ring"], colors=["red", "green"], fills=["solid", "dotted"])
    asked = []

    def stars(tokens, seed):
        asked.append((tokens, seed))
        scenes = large("star", len(tokens))
        return render(scenes, 64)

    report = score_outlines(stars, world, per_shape=3, resolution=64, generator=generator(), seed=7)
    generated, renders = report["generated"], report["renders"]
    assert report["captions"] == len(asked[0][0]) == 9 and asked[0][1] == 7
    assert list(generated["by_shape"]) == ["circle", "star", "ring"]
    assert generated["by_shape"]["star"] > 0.97 and generated["worst"] < 0.8
    assert renders["worst"] == min(renders["by_shape"].values()) > 0.96
    assert generated["mean"] == pytest.approx(sum(generated["by_shape"].values()) / 3, abs=1e-4)
    options = dict(per_shape=1, resolution=64, generator=generator())
    assert score_outlines(stars, World(textures=["dotted"]), **options) is None


def test_denoising_of_a_decoder_whose_answer_is_known():
    """Catches: x0 from the wrong formula or time, and the dB of another scale."""
    unet = dict(in_channels=3, out_channels=3, channels=(8,), layers_per_block=1, num_groups=4,
                attention_levels=(0,), head_dim=8, cross_dim=8)  # fmt: skip
    tower = dict(num_tokens=9, context_length=4, dim=8, depth=1, heads=2)
    options = dict(image_size=16, image_embed_dim=4, text_encoder=tower, variance="fixed_small",
                   schedule=dict(name="continuous_cosine"))  # fmt: skip
    decoder = Decoder(unet, prediction="edm", **options)  # untrained, the U-Net answers 0
    images = render(sample_scenes(6, generator()), 16)
    given = torch.zeros(6, 4), torch.ones(6, 4, dtype=torch.int64), torch.arange(6)
    # It returns nearly the input, whose noise in [0, 1] is e^(-log-SNR / 2) / 2; clipping to
    # [0, 1] and sigma_data remove a part of it.
    for log_snr, x0 in denoise_once(decoder, images, *given, log_snrs=(4, 8, 14)):
        decibels = psnr(x0, images).mean().item()
        noise = 10 * torch.log10(4 * torch.tensor(float(log_snr)).exp()).item()
        assert noise - 0.1 < decibels < noise + 3, (log_snr, decibels)
