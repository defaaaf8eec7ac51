"""Scenes, worlds and pictures: pinned to the values that trained checkpoints and measurements stand on."""

import hashlib
import sys

import pytest
import torch

from dalle2_fast.data.synthetic import vocabulary as v
from dalle2_fast.data.synthetic.palette import palette, rgb_to_lab
from dalle2_fast.data.synthetic.rendering import render
from dalle2_fast.data.synthetic.scenes import (
    has_held_out_pair,
    has_held_out_relation,
    held_out_pairs,
    is_sound,
    sample_scenes,
    valid_slots,
)
from dalle2_fast.data.synthetic.shapes import AREAS, CALIBRATION, SIGNED_DISTANCES, calibrate
from dalle2_fast.data.synthetic.world import World

DISCRETE = ("kind", "nobj", "shape", "color", "fill", "size", "rel", "pos", "bg", "btex")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def digest(*tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def named(names, table):
    return torch.tensor([name in names for name in table])


# ------------------------------------------------------------------------------------------ pinned values
@pytest.mark.parametrize("split, expected", [
    ("train", "7051cac8bf36f30c"),
    ("iid", "206d82c904238437"),
    ("comp", "199da9073163d984"),
    ("all", "197be3e611e4f2ea"),
])
def test_scenes_are_pinned(split, expected):
    """A changed order of draws, a changed table: any of them would make another world."""
    scenes = sample_scenes(200, generator(11), split)
    assert digest(*(scenes[key] for key in DISCRETE)) == expected


def test_places_are_pinned():
    scenes = sample_scenes(200, generator(11))
    sums = [scenes[key].double().sum().item() for key in ("r", "rot", "cx", "cy", "cj", "bj", "ph")]
    expected = [140.4453, 0.661, 489.8414, 491.1998, 1.9552, 0.2467, 208.5284]
    assert sums == pytest.approx(expected, abs=1e-4)


def test_restricted_scenes_are_pinned():
    world = World(
        shapes=["circle", "star", "heart"],
        colors=["red", "green", "white"],
        fills=["solid"],
        backgrounds=["white", "navy"],
        textures=["plain"],
        kinds=["one", "two", "count"],
    )
    scenes = sample_scenes(200, generator(11), world=world)
    assert digest(*(scenes[key] for key in DISCRETE)) == "b53e883caf355455"


def test_pictures_are_pinned():
    """Means over 16 x 16 blocks, in 1/255: no rounding of sqrt or exp reaches them, a moved edge does."""
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


# ------------------------------------------------------------------------------------------------- palette
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


# ------------------------------------------------------------------------------------------------- splits
def test_splits():
    assert held_out_pairs().sum() == 12 and (held_out_pairs().sum(0) == 1).all()
    train, iid, comp = (sample_scenes(1500, generator(1), split) for split in ("train", "iid", "comp"))
    assert not has_held_out_pair(train).any() and not has_held_out_relation(train).any()
    assert not has_held_out_pair(iid).any() and has_held_out_relation(iid).any()
    assert has_held_out_pair(comp).all()
    pairs = sample_scenes(1500, generator(1), "all", World(kinds=["two"]))
    assert 0.07 < has_held_out_relation(pairs).float().mean() < 0.13


def test_scenes_are_sound_and_stay_on_the_canvas():
    scenes = sample_scenes(2000, generator(2), "all")
    assert is_sound(scenes).all()
    used = valid_slots(scenes)
    x, y, r = scenes["cx"], scenes["cy"], scenes["r"]
    for place in (x, y):
        assert ((place - r)[used] > 0).all() and ((place + r)[used] < 1).all()
    left = scenes["rel"] == v.LEFT
    assert (x[left, 0] + r[left, 0] < x[left, 1] - r[left, 1]).all()
    above = scenes["rel"] == v.ABOVE
    assert (y[above, 0] + r[above, 0] < y[above, 1] - r[above, 1]).all()
    inside = scenes["rel"] == v.INSIDE
    apart = (x[inside, 0] - x[inside, 1]).hypot(y[inside, 0] - y[inside, 1])
    assert (apart + r[inside, 1] < r[inside, 0]).all()


def test_sizes_of_requests():
    for n in (0, 1, 3):
        scenes = sample_scenes(n, generator(0))
        assert all(len(value) == n for value in scenes.values())
        assert render(scenes, 8).shape == (n, 3, 8, 8)
    with pytest.raises(ValueError, match="n: expected an int >= 0, got -1"):
        sample_scenes(-1)
    with pytest.raises(ValueError, match="split: expected one of train, iid, comp, all; got 'test'"):
        sample_scenes(1, split="test")


# -------------------------------------------------------------------------------------------------- World
RESTRICTIONS = [
    dict(shapes=["heart", "ring"], kinds=["one", "three"]),
    dict(sizes=["small", "large"]),
    dict(sizes=["medium"]),
    dict(sizes=["large"]),
    dict(fills=["striped"], shapes=["circle", "star"]),
    dict(colors=["red", "blue", "white"], backgrounds=["gray"], textures=["plain", "dotted"]),
    dict(kinds=["two"], relations=["above", "inside"]),
]


@pytest.mark.parametrize("options", RESTRICTIONS)
def test_scenes_use_nothing_outside_their_world(options):
    world = World(**options)
    scenes = sample_scenes(300, generator(3), "all", world)
    used = valid_slots(scenes)
    objects = dict(
        shape=(world.shapes, v.SHAPES),
        color=(world.colors, v.COLORS),
        fill=(world.fills, v.FILLS),
        size=(world.sizes, v.SIZES),
    )
    for key, (names, table) in objects.items():
        assert named(names, table)[scenes[key][used]].all(), key
    whole = dict(
        kind=(world.kinds, v.KINDS),
        bg=(world.backgrounds, v.BACKGROUNDS),
        btex=(world.textures, v.TEXTURES),
    )
    for key, (names, table) in whole.items():
        assert named(names, table)[scenes[key]].all(), key
        assert len(scenes[key].unique()) == len(names), f"{key}: all that were asked for appear"
    related = scenes["rel"][scenes["kind"] == v.TWO]
    assert named(world.relations, v.RELATIONS)[related].all()


def test_worlds_are_rebuilt_from_their_configuration():
    for options in [{}, *RESTRICTIONS]:
        world = World(**options)
        assert World.from_config(world.to_config()) == World(**world.to_config()) == world
    assert World() != World(kinds=["one"])
    assert repr(World(kinds=["one"])) == "World(kinds=['one'])"
    with pytest.raises(ValueError, match="size"):
        World.from_config({"size": ["small"]})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(shapes=["circle", "blob"]), "shapes: expected names of circle, .*; got blob"),
        (dict(colors=[]), "colors: expected at least one"),
        (dict(kinds="one"), "kinds: expected a sequence of names, got the single string 'one'"),
        (dict(relations=["inside"], fills=["striped"]), "relations: 'inside' is not possible.*\"solid\""),
        (dict(relations=["inside"], shapes=["ring"]), "relations: 'inside' is not possible"),
        (dict(kinds=["count"], sizes=["large"]), "kinds: 'count' is not possible"),
    ],
)
def test_impossible_worlds(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        World(**options)


def test_what_a_world_cannot_show_is_left_out():
    assert "inside" not in World(shapes=["star"]).relations
    assert World(sizes=["large"]).kinds == ("one",)


def test_world_without_scenes_in_a_split():
    world = World(shapes=["circle"], colors=["red", "blue"])  # held out is the green circle
    with pytest.raises(ValueError, match="no scene .*in the split 'comp'"):
        sample_scenes(4, generator(0), "comp", world)


# ------------------------------------------------------------------------------------------------- render
def test_pictures_do_not_depend_on_their_batch(monkeypatch):
    scenes = sample_scenes(30, generator(4), "all")
    together = render(scenes, 32)
    single = [{key: value[i : i + 1] for key, value in scenes.items()} for i in range(30)]
    alone = torch.cat([render(scene, 32) for scene in single])
    monkeypatch.setattr(sys.modules["dalle2_fast.data.synthetic.rendering"], "CPU_CHUNK_PIXELS", 4 * 32**2)
    torch.testing.assert_close(render(scenes, 32), together, atol=1e-6, rtol=0)
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)


def test_pictures():
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


def test_object_has_its_color_shape_and_place():
    """A solid red shape alone, in the middle of its cell: colour in the centre, area as calibrated."""
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
def test_pictures_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scenes = sample_scenes(64, generator(8), "all")
    there = render({key: value.cuda() for key, value in scenes.items()}, 64)
    assert (there.cpu() - render(scenes, 64)).abs().mean() < 1e-4
    drawn = sample_scenes(64, torch.Generator("cuda").manual_seed(0), device="cuda")
    assert drawn["shape"].is_cuda and is_sound(drawn).all()
