"""World: scenes use nothing outside of it; impossible choices are named."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast.data.synthetic import vocabulary as v
from dalle2_fast.data.synthetic.scenes import sample_scenes, valid_slots
from dalle2_fast.data.synthetic.world import World
from tests.support.seeded import generator


def named(names, table):
    return torch.tensor([name in names for name in table])


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


def test_a_reweighted_world_shows_the_same_more_or_less_often():
    """Catches: weights that change what scenes may show, are not applied, or change other worlds."""
    world = World(kinds=["one", "three"], textures=["plain"])
    plain = sample_scenes(400, generator(5), "all", world)
    more = world.reweighted({"shapes": {"square": 4.0}, "kinds": {"three": 6.0}})
    scenes = sample_scenes(2000, generator(5), "all", more)
    assert more == world and more.to_config() == world.to_config()
    used = valid_slots(scenes)
    squares = (scenes["shape"][used] == v.SHAPES.index("square")).float().mean()
    assert 0.2 < squares < 0.33  # 4 / 15
    assert (scenes["kind"] == v.THREE).float().mean() > 0.6  # 3 / 4, but a third of them is rejected
    again = sample_scenes(400, generator(5), "all", world)
    assert all(torch.equal(again[key], plain[key]) for key in plain)
    unchanged = sample_scenes(400, generator(5), "all", world.reweighted({}))
    assert all(torch.equal(unchanged[key], plain[key]) for key in plain)
    for factors, message in (
        ({"colors": {"red": 2.0}}, "factors: expected keys of shapes, .*, got 'colors'"),
        ({"kinds": {"two": 2.0}}, "factors: expected kinds of one, three; got 'two'"),
        ({"kinds": {"one": 0.0}}, "factors: expected numbers > 0, got 0.0 for 'one'"),
    ):
        with pytest.raises(ValueError, match=message):
            world.reweighted(factors)
