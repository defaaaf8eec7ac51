"""Captions: pinned, true of their scenes, with the words of their vocabulary."""

from __future__ import annotations

import hashlib

import pytest
import torch

from dalle2_fast.data.synthetic import vocabulary as v
from dalle2_fast.data.synthetic.captions import compose, draw_phrasing, make_captions
from dalle2_fast.data.synthetic.scenes import sample_scenes
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.data.text.tokenizer import WordTokenizer
from tests.support.seeded import digest, generator

TOKENIZER = WordTokenizer.scenes()


def test_vocabulary_is_pinned():
    """A changed word or order: token ids are part of every checkpoint."""
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
    """A stated attribute that is not the scene's: every one is read back from the words."""
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
    """A cut end: three objects with everything stated make the longest captions."""
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
