"""The reader of images: it reads true images right, and sees what is wrong in others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast.data.synthetic.captions import draw_phrasing, make_captions, stated
from dalle2_fast.data.synthetic.palette import palette
from dalle2_fast.data.synthetic.rendering import render
from dalle2_fast.data.synthetic.scenes import sample_scenes
from dalle2_fast.data.synthetic.vocabulary import BACKGROUNDS, COUNT, ONE, RELATIONS, TWO
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.evaluation.baselines import shuffle_images
from dalle2_fast.evaluation.reading.components import holes, label_components
from dalle2_fast.evaluation.reading.reader import Reader
from dalle2_fast.evaluation.scores import ATTRIBUTES, judge, score_captions

PLAIN = World(
    shapes=["circle", "square", "triangle", "star", "heart", "ring"],
    colors=["red", "orange", "yellow", "green", "blue", "purple", "white", "black"],
    fills=["solid"],
    relations=["left", "right", "above", "below"],
    backgrounds=["white", "black", "gray", "navy"],
    textures=["plain"],
    kinds=["one", "two", "count"],
)
READER = Reader(PLAIN)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes_of(kind: int, n: int = 48, seed: int = 0):
    """Scenes of one kind, and captions that state everything."""
    names = {ONE: "one", TWO: "two", COUNT: "count"}
    world = World(**PLAIN.to_config() | {"kinds": [names[kind]]})
    scenes = sample_scenes(n, generator(seed), "all", world)
    return scenes, stated(scenes, draw_phrasing(n, drop=0))


def rates(images, scenes, says) -> dict[str, float]:
    """Attribute -> share of images that have it right, of all that state it."""
    right, applies = judge(READER.read(images), scenes, says)
    return {
        name: (right[name] & applies[name]).sum().item() / applies[name].sum().item()
        for name in ATTRIBUTES
        if applies[name].any()
    }


def blurred(images, width: float = 1.0):
    taps = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * width**2))
    kernel = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
    padded = F.pad(images, (3,) * 4, mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel).view(images.shape)


# Catches: any reader fault that costs a model scores it earned. The claim of the reader's docstring.
@pytest.mark.parametrize("split", ["iid", "comp"])
def test_true_pictures_of_the_plain_world_are_read_right(split):
    scenes = sample_scenes(100, generator(1), split, PLAIN)
    _, says = make_captions(scenes, generator(2))
    for kind, row in score_captions(READER.read(render(scenes, 64)), scenes, says).items():
        for name, tally in row.items():
            assert tally.rate >= 0.99, (kind, name, tally)


# Catches: stripes, dots, textures, objects inside others that are taken for something else.
def test_true_pictures_of_the_whole_world_are_nearly_all_read_right():
    scenes = sample_scenes(100, generator(3), "all")
    says = stated(scenes, draw_phrasing(100, drop=0))
    right, applies = judge(Reader().read(render(scenes, 64)), scenes, says)
    for name in ATTRIBUTES:
        asked = applies[name]
        assert (right[name] & asked).sum() >= 0.96 * asked.sum(), name


# Catches: a reader that only works on exact renders, not on what a network draws.
def test_blur_noise_and_specks_do_not_matter():
    scenes = sample_scenes(60, generator(4), "all", PLAIN)
    says = stated(scenes, draw_phrasing(60, drop=0))
    images = blurred(render(scenes, 64))
    images = images + 0.03 * torch.randn(images.shape, generator=generator(5))
    images[:, :, 0:3, 0:4] = torch.tensor([0.9, 0.1, 0.9])[:, None, None]
    for name, rate in rates(images.clamp(0, 1), scenes, says).items():
        assert rate >= 0.97, name


# Catches: a resolution baked in; 256 px images are the pipeline's default output.
@pytest.mark.parametrize("size", [32, 256])
def test_other_sizes_are_read_too(size):
    scenes, says = scenes_of(ONE, 24)
    assert rates(render(scenes, size), scenes, says)["everything"] >= 0.95


def another(values, choices):
    """For each value another one of the choices."""
    place = (values[..., None] == choices).int().argmax(-1)
    return choices[(place + 1) % len(choices)]


def with_another(scenes, name: str):
    """The scenes with one attribute of their single object changed to a value that can be seen as well."""
    if name == "size":
        middle = torch.tensor([0.0975, 0.145, 0.2075])
        return scenes | {"r": middle[(scenes["size"] + 1) % 3]}
    if name == "position":
        return scenes | {"cx": torch.where(scenes["cx"] > 0.6, scenes["cx"] - 0.4, 0.75)}
    key = "bg" if name == "background" else name
    choices = PLAIN.ids(name + "s")
    return scenes | {key: another(scenes[key], choices)}


# Catches: an attribute that is right regardless of what the image shows, or that changes another one.
@pytest.mark.parametrize("name", ["color", "shape", "size", "position", "background"])
def test_one_wrong_attribute_costs_exactly_itself(name):
    scenes, says = scenes_of(ONE, 64)
    if name == "size":  # in the middle, where every size has room
        centre = {key: torch.full_like(scenes[key], 0.5) for key in ("cx", "cy")}
        scenes |= centre | {"pos": torch.full_like(scenes["pos"], 4)}
    shown = with_another(scenes, name)
    visible = palette().allowed[shown["color"][:, 0], 0, shown["bg"]]
    parts = (scenes, says, shown)
    scenes, says, shown = ({key: value[visible] for key, value in part.items()} for part in parts)
    found = rates(render(shown, 64), scenes, says)
    wrong = {name, "everything"} | ({"binding"} if name in ("color", "shape") else set())
    for attribute, rate in found.items():
        assert rate <= 0.03 if attribute in wrong else rate >= 0.95, attribute


# Catches: a background unlike any of the world's that counts as the first one, whichever is nearest.
def test_a_strange_background_is_read_as_the_nearest():
    strange = torch.tensor([[0.2, 0.0, 0.5], [0.75, 0.45, 0.45]])  # nearest: navy, gray
    reading = READER.read(strange[:, :, None, None].expand(-1, -1, 64, 64))
    assert [BACKGROUNDS[index] for index in reading.background] == ["navy", "gray"]


# Catches: binding that is only "both colours and both shapes are there".
def test_exchanged_colors_break_the_binding_and_nothing_else():
    scenes, says = scenes_of(TWO, 64)
    differ = torch.stack([scenes[key][:, 0] != scenes[key][:, 1] for key in ("shape", "color")]).all(0)
    scenes, says = ({key: value[differ] for key, value in part.items()} for part in (scenes, says))
    shown = dict(scenes, color=scenes["color"].clone())
    shown["color"][:, :2] = scenes["color"][:, :2].flip(1)
    found = rates(render(shown, 64), scenes, says)
    assert found["binding"] == 0 and found["everything"] == 0
    assert min(found["color"], found["shape"], found["count"], found["background"]) >= 0.98


# Catches: left and right (above and below) confused, or read from the order of the objects.
def test_mirrored_pictures_have_the_opposite_relation():
    scenes, says = scenes_of(TWO)
    images = render(scenes, 64)
    level = torch.tensor([name in ("left", "right") for name in RELATIONS])[scenes["rel"]]
    mirrored = torch.where(level[:, None, None, None], images.flip(-1), images)
    right, _ = judge(READER.read(mirrored), scenes, says)
    assert not right["relation"][level].any() and right["relation"][~level].all()
    assert right["binding"].float().mean() > 0.97


# Catches: merged or missed neighbours, and a missing object forgiven.
def test_a_missing_object_is_missed():
    for kind in (TWO, COUNT):
        scenes, says = scenes_of(kind)
        found = rates(render(scenes | {"nobj": scenes["nobj"] - 1}, 64), scenes, says)
        assert found["count"] == 0 and found["everything"] == 0
        if kind == TWO:
            assert found["binding"] == 0 and found["relation"] == 0


# Catches: scores that do not depend on the caption.
def test_shuffled_pictures_score_far_lower():
    scenes = sample_scenes(120, generator(6), "iid", PLAIN)
    _, says = make_captions(scenes, generator(7))
    shuffled = score_captions(shuffle_images(READER.read(render(scenes, 64)), scenes["kind"]), scenes, says)
    for kind in shuffled:
        assert shuffled[kind]["binding"].rate < 0.15 and shuffled[kind]["everything"].rate < 0.1
        assert shuffled[kind]["background"].rate < 0.6
    assert shuffled["one"]["color"].rate < 0.4 and shuffled["one"]["position"].rate < 0.4


# Catches: unstated attributes that are scored, so that a right image is called wrong.
def test_only_what_is_stated_counts():
    scenes, says = scenes_of(ONE)
    silent = {name: torch.zeros_like(value) for name, value in says.items()}
    moved = scenes | {"cx": 1 - scenes["cx"]}
    right, applies = judge(READER.read(render(moved, 64)), scenes, silent)
    assert not applies["position"].any() and not applies["size"].any()
    assert right["everything"].float().mean() > 0.97


# Catches: crashes and invented objects on images without objects, also where objects lie in others: what an
# untrained decoder draws.
@pytest.mark.parametrize(
    "world", [PLAIN, World(), World(**PLAIN.to_config() | {"relations": ["left", "inside"]})],
    ids=["plain", "whole", "nested"],
)  # fmt: skip
def test_pictures_of_nothing(world):
    reader = Reader(world)
    flat = torch.tensor([[242, 242, 240], [24, 24, 28]])[:, :, None, None].expand(-1, -1, 64, 64) / 255
    reading = reader.read(flat)
    assert reading.count.tolist() == [0, 0] and reading.background.tolist() == [0, 1]
    assert (reading.shape == -1).all()
    assert len(reader.read(flat[:0]).count) == 0
    reader.read(torch.rand(2, 3, 64, 64, generator=generator()))  # noise: any answer, but one


@pytest.mark.parametrize("images", [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64),
                                    torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])  # fmt: skip
def test_not_pictures(images):
    with pytest.raises(ValueError, match=r"images: expected float \[n, 3, H, W\]"):
        READER.read(images)


def flood(mask):
    """Components by hand: sets of pixels."""
    todo, found = {tuple(p) for p in mask.nonzero().tolist()}, set()
    while todo:
        stack, component = [todo.pop()], set()
        while stack:
            y, x = stack.pop()
            component.add((y, x))
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in todo:
                    todo.remove(near)
                    stack.append(near)
        found.add(frozenset(component))
    return found


# Catches: label spreading that stops early (snakes are long) or leaks between images.
def test_components_are_those_of_a_flood_fill():
    share = torch.tensor([0.3, 0.5, 0.6, 0.65, 0.9, 1.0])[:, None, None]
    masks = torch.rand(6, 20, 20, generator=generator()) < share
    snake = torch.ones(20, 20, dtype=torch.bool)
    snake[1::4, :-1] = False
    snake[3::4, 1:] = False
    masks[0] = snake
    labels = label_components(masks)
    for index, (mask, label) in enumerate(zip(masks, labels, strict=True)):
        groups = [(label == value).nonzero().tolist() for value in label[mask].unique()]
        assert {frozenset(map(tuple, group)) for group in groups} == flood(mask)
        assert (label[~mask] == -1).all() and (label[mask] // 400 == index).all()


def test_holes():
    ring = torch.zeros(1, 9, 9, dtype=torch.bool)
    ring[0, 2:7, 2:7] = True
    ring[0, 4, 4] = False
    row, hole = holes(ring)
    assert row.tolist() == [0] and hole[0].nonzero().tolist() == [[4, 4]]
