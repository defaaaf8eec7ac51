"""Captions, tokenizer, hard negatives and the stream of batches."""

import hashlib
import itertools
import json

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
from dalle2_fast.data.synthetic.stream import SceneStream
from dalle2_fast.data.synthetic.words import scene_words
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.data.text.tokenizer import WordTokenizer, split_words

TOKENIZER = WordTokenizer.scenes()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def digest(*tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------- captions
def test_vocabulary_is_pinned():
    """Token ids are part of every checkpoint."""
    assert len(v.WORDS) == 126 == len(set(v.WORDS))
    assert hashlib.sha256(" ".join(v.WORDS).encode()).hexdigest()[:16] == "8c16503628959c0f"


def test_captions_are_pinned():
    scenes = sample_scenes(200, generator(11), "all")
    tokens, says = make_captions(scenes, generator(12))
    assert tokens.shape == (200, 36) and tokens.dtype == torch.int64
    assert TOKENIZER.decode(tokens[0]) == "a large solid pink hexagon in the lower part"
    assert digest(tokens) == "0e5c08a1847d5e4e"
    assert digest(*(says[key] for key in ("size", "fill", "pos", "bg", "btex", "rel"))) == "1e4ae5e0f05b29d6"
    canonical, _ = make_captions(scenes, generator(12), drop=0, canonical=True)
    assert digest(canonical) == "3895e4996218ca96"


def test_captions_tell_the_scene():
    """Read back from the words: every stated attribute is that of the scene."""
    scenes = sample_scenes(400, generator(1), "all", World(kinds=["one", "count"]))
    tokens, says = make_captions(scenes, generator(2), drop=0, canonical=True)
    for index, row in enumerate(tokens):
        words = TOKENIZER.decode(row).split()
        kind = scenes["kind"][index]
        names = v.PLURALS if kind == v.COUNT else v.SHAPES
        assert names[scenes["shape"][index, 0]] in words
        assert v.COLORS[scenes["color"][index, 0]] in words
        assert v.SIZES[scenes["size"][index, 0]] in words
        assert v.BACKGROUNDS[scenes["bg"][index]] in words
        assert (v.COUNTS[scenes["nobj"][index]] in words) == (kind == v.COUNT)
        if kind == v.ONE:
            phrases = v.POSITION_PHRASES[scenes["pos"][index]]
            assert any(phrase in " ".join(words) for phrase in phrases)
    assert says["bg"].all() and says["size"].all() and says["rel"].sum() == 0


def test_canonical_captions_have_no_synonyms():
    scenes = sample_scenes(500, generator(1), "all")
    tokens, _ = make_captions(scenes, generator(2), canonical=True)
    words = {word for row in tokens for word in TOKENIZER.decode(row).split()}
    assert not words & {"disk", "crimson", "tiny", "huge", "moons", "stripy", "grey"}
    free, _ = make_captions(scenes, generator(2))
    assert {"disk", "crimson", "tiny", "huge", "moons", "stripy", "grey"} <= {
        word for row in free for word in TOKENIZER.decode(row).split()
    }


def test_captions_never_fill_their_row():
    """Three objects with everything stated, the longest captions: begin and end are always there."""
    scenes = sample_scenes(1000, generator(3), "all", World(kinds=["three"]))
    tokens, _ = make_captions(scenes, generator(4), drop=0)
    assert (tokens[:, 0] == v.BOS).all() and (tokens[:, -1] == v.PAD).all()
    assert ((tokens == v.EOS).sum(1) == 1).all()


def test_phrasing_does_not_depend_on_the_scenes():
    phrasing = draw_phrasing(50, generator(0))
    index = torch.tensor([4, 4, 17])
    scenes = sample_scenes(50, generator(1))
    some = {key: value[index] for key, value in scenes.items()}
    assert torch.equal(compose(some, phrasing.rows(index)), compose(scenes, phrasing)[index])
    with pytest.raises(ValueError, match="drop: expected 0 .* or 1 .*, got 0.5"):
        make_captions(scenes, drop=0.5)


# ---------------------------------------------------------------------------------------------- tokenizer
def test_tokenizer_round_trip():
    scenes = sample_scenes(300, generator(5), "all")
    tokens, _ = make_captions(scenes, generator(6))
    captions = [TOKENIZER.decode(row) for row in tokens]
    assert torch.equal(TOKENIZER.encode(captions), tokens)
    loud, plain = TOKENIZER.encode(["A RED, mid-sized circle.", "a red mid-sized circle"])
    assert torch.equal(loud, plain)
    assert TOKENIZER.encode([]).shape == (0, 36)
    assert TOKENIZER.vocab_size == 126


def test_words_of_a_world_are_exactly_those_of_its_captions():
    worlds = (
        {},
        dict(kinds=["one"]),
        dict(fills=["solid"], kinds=["two"], relations=["above"]),
        dict(shapes=["ring", "cross"], sizes=["medium"], fills=["solid", "dotted"]),
    )
    for options in worlds:
        world = World(**options)
        seen = set()
        for seed in range(3):
            scenes = sample_scenes(3000, generator(seed), "all", world)
            seen |= set(make_captions(scenes, generator(seed))[0].unique().tolist())
        assert {v.WORDS[index] for index in seen if index > v.UNK} == set(scene_words(world)), options


def test_unknown_words_are_named_with_the_known_ones():
    small = WordTokenizer.scenes(World(shapes=["star", "circle"], colors=["red", "blue"], kinds=["one"]))
    assert torch.equal(small.encode("a red star"), TOKENIZER.encode("a red star")), "ids are the table's"
    with pytest.raises(ValueError, match='unknown words "green", "dinosaurs" in the caption.* red .* star '):
        small.encode("a green dinosaurs star")
    ids = [v.BOS, v.WORD_TO_ID["a"], v.UNK, v.WORD_TO_ID["star"], v.EOS]
    assert small.encode("a green star", unknown="token")[0, :5].tolist() == ids


def test_impossible_captions():
    with pytest.raises(ValueError, match="the caption ' .,' is empty: expected 1 to 34 words"):
        TOKENIZER.encode(" .,")
    with pytest.raises(ValueError, match="the caption has 35 words: expected at most 34"):
        TOKENIZER.encode(" ".join(["red"] * 35))
    assert TOKENIZER.encode(" ".join(["red"] * 34))[0, -1] == v.EOS
    assert TOKENIZER.encode(" ".join(["red"] * 99), truncate=True)[0, -1] == v.EOS
    with pytest.raises(TypeError, match="captions: expected str, got int"):
        TOKENIZER.encode([3])
    with pytest.raises(ValueError, match="row: expected ids from 0 to 125, got 126"):
        TOKENIZER.decode([1, 126, 2])
    with pytest.raises(ValueError, match="row: expected"):
        TOKENIZER.decode(TOKENIZER.encode("a red star"))


def test_tokenizers_are_rebuilt_from_their_configuration():
    small = WordTokenizer.scenes(World(kinds=["one"]))
    for tokenizer in (TOKENIZER, WordTokenizer(["a", "b"], 5), small):
        config = json.loads(json.dumps(tokenizer.to_config()))
        assert WordTokenizer.from_config(config) == tokenizer
    with pytest.raises(ValueError, match="tokenizer: expected keys"):
        WordTokenizer.from_config({"words": []})
    for table, message in ((["a", "a"], "twice"), (["A"], "'A'"), (["two words"], "'two words'")):
        with pytest.raises(ValueError, match=message):
            WordTokenizer(table)
    with pytest.raises(ValueError, match="known: expected words of the table, got c"):
        WordTokenizer(["a", "b"], known=["c"])


def test_tokenizer_from_captions():
    captions = ["The cat's hat.", "the blue-green cat", "THE naïve dog"]
    tokenizer = WordTokenizer.from_captions(captions, size=6)
    assert tokenizer.words == ("the", "blue-green"), "the most frequent first, equal ones by name"
    assert tokenizer.vocab_size == 6
    assert split_words(captions[0]) == ["the", "cat's", "hat"]
    assert split_words(captions[2]) == ["the", "naïve", "dog"]
    with pytest.raises(ValueError, match="at least one word"):
        WordTokenizer.from_captions([""])


# ---------------------------------------------------------------------------------------------- negatives
def described_objects(scenes, says, index):
    """What a caption says, as a value: the same for the same meaning. Written apart from `contradicts`."""

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
    assert (right != wrong).any(1)[hard].all(), "told by the caption"
    says, says_wrong = stated(scenes, phrasing), stated(edited, phrasing)
    for index in hard.nonzero()[:, 0].tolist():
        assert described_objects(scenes, says, index) != described_objects(edited, says_wrong, index)


def test_true_captions_are_never_negatives():
    """The same objects in another order, a relation read from the other side, something that was not said."""
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
    """One word is exchanged, and nothing else moves."""
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


# ------------------------------------------------------------------------------------------------- stream
def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b)


def test_stream_is_a_function_of_seed_and_step():
    options = dict(batch_size=16, resolutions=(16, 32), negatives=2)
    stream = SceneStream(**options)
    first = [stream.batch(step) for step in range(3)]
    assert equal(SceneStream(**options).batch(2), first[2])
    assert equal(stream.batch(0), first[0])
    assert not torch.equal(first[0]["tokens"], first[1]["tokens"])
    assert not torch.equal(SceneStream(**options, seed=1).batch(0)["tokens"], first[0]["tokens"])
    assert first[0]["images"][16].shape == (16, 3, 16, 16) and first[0]["images"][32].shape == (16, 3, 32, 32)
    assert first[0]["negatives"].shape == (16, 2, 36) and first[0]["negative_mask"].shape == (16, 2)


def test_batches_made_together_are_cut_from_one():
    """Catches: a batch of the block before; rows of one tensor beside those of another."""
    options = dict(resolutions=(16,), seed=3, negatives=2)
    together, whole = SceneStream(batch_size=4, at_once=3, **options), SceneStream(batch_size=12, **options)
    for step in (4, 2, 3, 4):
        batch, expected = together.batch(step), whole.batch(step // 3)
        rows = slice(step % 3 * 4, step % 3 * 4 + 4)
        assert torch.equal(batch["images"][16], expected["images"][16][rows])
        for key in ("tokens", "negatives", "negative_mask"):
            assert torch.equal(batch[key], expected[key][rows])
        for key, value in expected["scenes"].items():
            assert torch.equal(batch["scenes"][key], value[rows])


def test_negatives_do_not_change_the_batch():
    plain, hard = SceneStream(None, 16, (16,)).batch(5), SceneStream(None, 16, (16,), negatives=True).batch(5)
    assert "negatives" not in plain
    assert hard.pop("negatives").shape == (16, 3, 36) and hard.pop("negative_mask").dtype == torch.bool
    assert equal(plain, hard)


def test_stream_of_a_world_and_split():
    world = World(kinds=["one"], shapes=["circle"], colors=["green"])  # a held-out pair
    batch = SceneStream(world, 8, (8,), split="comp").batch(0)
    assert has_held_out_pair(batch["scenes"]).all()
    with pytest.raises(ValueError, match="no scene .*in the split 'train'"):
        SceneStream(world, 8, (8,)).batch(0)
    with pytest.raises(ValueError, match="batch_size: expected an int >= 1, got 0"):
        SceneStream(world, 0)
    with pytest.raises(ValueError, match="at_once: expected an int >= 1, got 0"):
        SceneStream(world, at_once=0)
