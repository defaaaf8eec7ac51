"""Scenes: pinned to the values on which trained checkpoints and measurements depend; splits; soundness."""

from __future__ import annotations

import pytest

from dalle2_fast.data.synthetic import vocabulary as v
from dalle2_fast.data.synthetic.rendering import render
from dalle2_fast.data.synthetic.scenes import (
    has_held_out_pair,
    has_held_out_relation,
    held_out_pairs,
    is_sound,
    sample_scenes,
    valid_slots,
)
from dalle2_fast.data.synthetic.world import World
from tests.support.seeded import digest, generator

DISCRETE = ("kind", "nobj", "shape", "color", "fill", "size", "rel", "pos", "bg", "btex")


@pytest.mark.parametrize("split, expected", [
    ("train", "7051cac8bf36f30c"),
    ("iid", "206d82c904238437"),
    ("comp", "199da9073163d984"),
    ("all", "197be3e611e4f2ea"),
])
def test_scenes_are_pinned(split, expected):
    """A changed order of random numbers, or a changed table, would make another world."""
    scenes = sample_scenes(200, generator(11), split)
    assert digest(*(scenes[key] for key in DISCRETE)) == expected


def test_positions_are_pinned():
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
