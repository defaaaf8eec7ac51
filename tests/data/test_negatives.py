"""Hard negatives: wrong for their image, possible in their split, and of the same phrasing."""

from __future__ import annotations

import itertools

import pytest
import torch

from dalle2_fast.data.synthetic import vocabulary as v
from dalle2_fast.data.synthetic.captions import compose, draw_phrasing, make_captions, stated
from dalle2_fast.data.synthetic.negatives import NEGATIVE_KINDS, contradicts, hard_negatives, sample_negatives
from dalle2_fast.data.synthetic.scenes import (
    has_held_out_pair,
    has_held_out_relation,
    is_sound,
    sample_scenes,
)
from dalle2_fast.data.synthetic.world import World
from tests.support.seeded import generator


def described_objects(scenes, says, index):
    """What a caption says, as a value that is equal for equal meanings; independent of `contradicts`."""

    def thing(slot):
        return (
            v.SHAPES[scenes["shape"][index, slot]],
            v.COLORS[scenes["color"][index, slot]],
            int(scenes["size"][index, slot]) if says["size"][index, slot] else None,
            int(scenes["fill"][index, slot]) if says["fill"][index, slot] else None,
        )

    kind = int(scenes["kind"][index])
    if kind == v.TWO and says["rel"][index]:
        relation, pair = int(scenes["rel"][index]), (thing(0), thing(1))
        if relation in (v.RIGHT, v.BELOW):
            relation, pair = relation - 1, pair[::-1]
        objects = (relation, pair)
    else:
        number = {v.ONE: 1, v.TWO: 2, v.COUNT: 1, v.THREE: 3}[kind]
        objects = tuple(sorted(map(thing, range(number)), key=str))
    extra = [int(scenes[key][index]) if says[key][index] else None for key in ("pos", "bg", "btex")]
    return (kind, objects, int(scenes["nobj"][index]), *extra)


@pytest.mark.parametrize("kind", NEGATIVE_KINDS)
def test_negatives_differ_in_meaning(kind):
    scenes = sample_scenes(600, generator(1), "all")
    phrasing = draw_phrasing(600, generator(2))
    edited, hard = hard_negatives(scenes, generator(3), kind, phrasing=phrasing)
    right, wrong = compose(scenes, phrasing), compose(edited, phrasing)
    assert hard.sum() > 15
    assert is_sound(edited)[hard].all()
    assert (right != wrong).any(1)[hard].all(), "the caption states the edit"
    says, says_wrong = stated(scenes, phrasing), stated(edited, phrasing)
    for index in hard.nonzero()[:, 0].tolist():
        assert described_objects(scenes, says, index) != described_objects(edited, says_wrong, index)


def test_true_captions_are_never_negatives():
    """The same objects in another order, a relation read from the other side, an attribute not stated."""
    scenes = sample_scenes(800, generator(1), "all")
    says = make_captions(scenes, generator(2))[1]
    assert not contradicts(scenes, scenes, says).any()

    def reordered(*order):
        slots = torch.tensor([*order, *range(len(order), 5)])
        return {key: scenes[key][:, slots] for key in ("shape", "color", "size", "fill")}

    three = scenes["kind"] == v.THREE
    for order in itertools.permutations(range(3)):
        slots = torch.tensor([*order, 3, 4])
        moved = says | {key: says[key][:, slots] for key in ("size", "fill")}
        assert not contradicts(scenes, scenes | reordered(*order), moved)[three].any()

    two = (scenes["kind"] == v.TWO) & (scenes["rel"] != v.INSIDE)
    moved = says | {key: says[key][:, [1, 0, 2, 3, 4]] for key in ("size", "fill")}
    inverse = torch.tensor([1, 0, 3, 2, 4])[scenes["rel"].clamp_min(0)]
    claimed = scenes | reordered(1, 0)
    assert not contradicts(scenes, claimed | {"rel": inverse}, moved)[two].any(), "B right of A: A left of B"
    swapped = contradicts(scenes, claimed, moved)[two]
    assert torch.equal(swapped, says["rel"][two]), "A left of B is not B left of A, but A and B is B and A"

    background = scenes | {"bg": (scenes["bg"] + 1) % 8}
    assert torch.equal(contradicts(scenes, background, says), says["bg"])


def test_negatives_share_their_phrasing():
    """A negative that another phrasing gives away: one word is exchanged, and all others stay."""
    scenes = sample_scenes(500, generator(4))
    phrasing = draw_phrasing(500, generator(5), canonical=True)
    edited, hard = hard_negatives(scenes, generator(6), "change_color", phrasing=phrasing)
    right, wrong = compose(scenes, phrasing), compose(edited, phrasing)
    assert ((right != wrong).sum(1)[hard] == 1).all()
    swapped, hard = hard_negatives(scenes, kind="swap_colors", phrasing=phrasing)
    words_right, words_wrong = (rows[hard].sort(1).values for rows in (right, compose(swapped, phrasing)))
    assert torch.equal(words_right, words_wrong)
    assert hard[scenes["kind"] == v.TWO].float().mean() > 0.5


def test_negatives_respect_split_and_world():
    world = World(colors=["red", "green", "blue", "white"], kinds=["two"], fills=["solid"])
    scenes = sample_scenes(800, generator(7), "train", world)
    phrasing = draw_phrasing(800, generator(8))
    for kind in ("swap_colors", "change_color", "change_relation", "change_fill"):
        options = dict(kind=kind, phrasing=phrasing, world=world)
        edited, hard = hard_negatives(scenes, generator(9), split="train", **options)
        assert not (has_held_out_pair(edited) | has_held_out_relation(edited))[hard].any()
        assert is_sound(edited, world)[hard].all()
        assert hard.any() == (kind != "change_fill"), "there is only one fill"
        anywhere = hard_negatives(scenes, generator(9), split="all", **options)[1]
        assert (anywhere >= hard).all()


def test_sampled_negatives():
    scenes = sample_scenes(500, generator(1))
    phrasing = draw_phrasing(500, generator(2))
    tokens, mask, kinds = sample_negatives(scenes, phrasing, generator(3), count=4)
    assert tokens.shape == (500, 4, 36) and mask.shape == kinds.shape == (500, 4)
    right = compose(scenes, phrasing)
    assert (tokens != right[:, None]).any(-1)[mask].all()
    assert mask[:, 0].float().mean() > 0.99 and mask.float().mean() > 0.85
    assert (mask[:, :-1] >= mask[:, 1:]).all(), "those to be used come first"
    assert (kinds.sort(1).values.diff(dim=1) > 0).all(), "of different kinds"
    shares = torch.bincount(kinds[mask], minlength=len(NEGATIVE_KINDS))
    assert (shares > 0).all()
    only, mask, _ = sample_negatives(scenes, phrasing, generator(3), count=1, kinds={"swap_objects": 1.0})
    edited, hard = hard_negatives(scenes, generator(3), "swap_objects", phrasing=phrasing, split="train")
    assert torch.equal(mask[:, 0], hard) and torch.equal(only[hard, 0], compose(edited, phrasing)[hard])


def test_a_changed_position_keeps_its_row_or_its_column():
    """Catches: negatives that the row alone gives away, by which a CLIP never learns left from right."""
    scenes = sample_scenes(2000, generator(1), "all", World(kinds=["one"]))
    edited, hard = hard_negatives(scenes, generator(2), "change_position")
    before, after = scenes["pos"][hard], edited["pos"][hard]
    same_row, same_column = before // 3 == after // 3, before % 3 == after % 3
    assert (same_row ^ same_column).all() and 0.4 < same_row.float().mean() < 0.6
    assert len(torch.stack([before, after]).unique(dim=1).T) == 9 * 4


def test_negatives_of_full_captions_by_default():
    scenes = sample_scenes(300, generator(1), "all", World(kinds=["two"]))
    edited, hard = hard_negatives(scenes, generator(2), "swap_objects")
    assert hard[scenes["rel"] != v.INSIDE].float().mean() > 0.95
    with pytest.raises(ValueError, match="kind: expected one of swap_colors, .*; got 'swap'"):
        hard_negatives(scenes, kind="swap")
    with pytest.raises(ValueError, match="count: expected 1 to 14"):
        sample_negatives(scenes, draw_phrasing(300), count=15)
