"""Images of scenes: pinned blocks, colours, shapes, independence of batch and device."""

from __future__ import annotations

import sys

import pytest
import torch

from dalle2_fast.data.synthetic import vocabulary as v
from dalle2_fast.data.synthetic.palette import palette, rgb_to_lab
from dalle2_fast.data.synthetic.rendering import render
from dalle2_fast.data.synthetic.scenes import is_sound, sample_scenes
from dalle2_fast.data.synthetic.shapes import AREAS, CALIBRATION, SIGNED_DISTANCES, calibrate
from dalle2_fast.data.synthetic.world import World
from tests.support.seeded import generator


def test_images_are_pinned():
    """Means over 16 x 16 blocks, in 1/255: a moved edge changes them, rounding of sqrt or exp does not."""
    images = render(sample_scenes(24, generator(5), "all"), 64)
    blocks = (torch.nn.functional.avg_pool2d(images, 16).mean(1) * 255).flatten(1)
    expected = [
        [28.4, 49.8, 64.1, 28.4, 41.3, 48.0, 52.1, 41.3, 54.1, 60.7, 90.2, 54.1, 67.0, 68.6, 75.6, 67.0],
        [24.8, 24.8, 24.8, 24.8, 24.8, 24.8, 24.8, 24.8, 24.8, 24.8, 38.7, 45.3, 24.8, 24.8, 52.1, 61.7],
        [201.6, 201.6, 199.5, 201.6, 188.2, 187.7, 185.4, 188.2, 174.9, 157.0, 152.6, 174.9,
         161.6, 144.7, 140.3, 161.5],
    ]
    torch.testing.assert_close(blocks[:3], torch.tensor(expected), atol=0.06, rtol=0)
    checks = images.double().mean((1, 2, 3)) * 255
    expected = [
        55.664, 30.985, 176.339, 59.029, 190.76, 75.68, 33.71, 168.6,
        173.717, 47.768, 62.88, 80.383, 195.454, 174.523, 28.798, 177.063,
        172.306, 75.497, 226.916, 190.014, 182.896, 191.049, 225.661, 62.519,
    ]
    torch.testing.assert_close(checks, torch.tensor(expected).double(), atol=0.005, rtol=0)


def test_calibration_is_what_calibrate_measures():
    torch.testing.assert_close(torch.tensor(calibrate()), torch.tensor(CALIBRATION), atol=1e-4, rtol=0)


def test_lab_of_known_colors():
    lab = rgb_to_lab(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    expected = torch.tensor([[100.0, 0.0, 0.0], [0.0, 0.0, 0.0], [53.24, 80.09, 67.20]])
    torch.testing.assert_close(lab, expected, atol=0.05, rtol=0)


def test_objects_can_be_seen_on_their_background():
    allowed = palette().allowed
    assert not allowed[v.COLORS.index("white"), :, v.BACKGROUNDS.index("white")].any()
    assert allowed[v.COLORS.index("red"), v.SOLID, v.BACKGROUNDS.index("white")]
    assert not (allowed[:, v.STRIPED] & ~allowed[:, v.SOLID]).any()
    assert allowed[:, v.SOLID].any(0).all() and allowed[:, v.SOLID].any(1).all()


def test_images_do_not_depend_on_their_batch(monkeypatch):
    scenes = sample_scenes(30, generator(4), "all")
    together = render(scenes, 32)
    single = [{key: value[i : i + 1] for key, value in scenes.items()} for i in range(30)]
    alone = torch.cat([render(scene, 32) for scene in single])
    monkeypatch.setattr(sys.modules["dalle2_fast.data.synthetic.rendering"], "CPU_CHUNK_PIXELS", 4 * 32**2)
    torch.testing.assert_close(render(scenes, 32), together, atol=1e-6, rtol=0)
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)


def test_images():
    scenes = sample_scenes(40, generator(6), "all")
    images = render(scenes, 64)
    assert images.shape == (40, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    # One scene at several resolutions: alike after averaging, up to the texture's aliasing.
    smooth = torch.nn.functional.avg_pool2d(render(scenes, 256), 4)
    assert (smooth - images).abs().mean() < 0.02
    empty = render(scenes | {"nobj": torch.zeros_like(scenes["nobj"])}, 64)
    assert (empty - images).abs().amax((1, 2, 3)).min() > 0.1, "objects can be seen"
    with pytest.raises(ValueError, match="resolution: expected an int >= 1, got 0"):
        render(scenes, 0)


def test_an_object_has_its_color_shape_and_position():
    """A single solid red shape has its colour at its centre, and the area to which it was calibrated."""
    world = World(kinds=["one"], colors=["red"], fills=["solid"], backgrounds=["white"], textures=["plain"])
    scenes = sample_scenes(300, generator(7), "all", world)
    images = render(scenes, 128)
    red = (images[:, 0] - images[:, 1]) > 0.35
    area = red.float().mean((1, 2)) / (torch.pi * scenes["r"][:, 0] ** 2)
    expected = torch.tensor(AREAS)[scenes["shape"][:, 0]]
    torch.testing.assert_close(area, expected, atol=0.06, rtol=0)
    axis = (torch.arange(128) + 0.5) / 128
    total = red.float().sum((1, 2))
    center_x = (red * axis).sum((1, 2)) / total
    center_y = (red * axis[:, None]).sum((1, 2)) / total
    torch.testing.assert_close(center_x, scenes["cx"][:, 0], atol=0.01, rtol=0)
    torch.testing.assert_close(center_y, scenes["cy"][:, 0], atol=0.01, rtol=0)


def test_distances_are_negative_inside_and_symmetric():
    axis = torch.linspace(-1.5, 1.5, 61)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for name, distance in zip(v.SHAPES, SIGNED_DISTANCES, strict=True):
        d = distance(x, y)
        assert (d < 0).any() and (d[0] > 0).all() and (d[:, 0] > 0).all(), name
        if name != "crescent":
            torch.testing.assert_close(d, distance(-x, y), atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_images_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scenes = sample_scenes(64, generator(8), "all")
    there = render({key: value.cuda() for key, value in scenes.items()}, 64)
    assert (there.cpu() - render(scenes, 64)).abs().mean() < 1e-4
    drawn = sample_scenes(64, torch.Generator("cuda").manual_seed(0), device="cuda")
    assert drawn["shape"].is_cuda and is_sound(drawn).all()
