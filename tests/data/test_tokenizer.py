"""WordTokenizer: rows and words, unknown words, configurations."""

from __future__ import annotations

import json

import pytest
import torch

from dalle2_fast.data.synthetic import vocabulary as v
from dalle2_fast.data.synthetic.captions import make_captions
from dalle2_fast.data.synthetic.grammar import EXAMPLES, word_groups
from dalle2_fast.data.synthetic.scenes import sample_scenes
from dalle2_fast.data.synthetic.words import scene_words
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.data.text.tokenizer import WordTokenizer, split_words
from tests.support.seeded import generator

TOKENIZER = WordTokenizer.scenes()


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


def test_unknown_words_are_named_with_the_nearest_known_ones():
    small = WordTokenizer.scenes(World(shapes=["star", "circle"], colors=["red", "blue"], kinds=["one"]))
    assert torch.equal(small.encode("a red star"), TOKENIZER.encode("a red star")), "ids are the table's"
    with pytest.raises(ValueError, match='unknown words "lilac", "dinosaurs" in the caption; .* the ') as few:
        small.encode("a lilac dinosaurs star")
    assert len(str(few.value)) < 150, "all known words fill a screen"
    with pytest.raises(ValueError, match=r'unknown word "sqare" \(nearest: square, squares\) in the'):
        TOKENIZER.encode("a red sqare")
    ids = [v.BOS, v.WORD_TO_ID["a"], v.UNK, v.WORD_TO_ID["star"], v.EOS]
    assert small.encode("a green star", unknown="token")[0, :5].tolist() == ids


@pytest.mark.parametrize(
    ("caption", "says"),
    [
        ("a checkered cyan square", '"checkered" before "square": .* only a background .*, never an object'),
        ("two navy, small stars", '"navy" before "stars"'),
        ("a red ring above a mint gradient disk on a navy background", '"mint", "gradient" before "disk"'),
        ("a ring on a dotted red background", '"red" before "background": .* only an object .* a background'),
    ],
)
def test_words_that_would_be_taken_for_another_part_are_refused(caption, says):
    """The checkers went to the background: the checkpoint has seen the word nowhere else."""
    with pytest.raises(ValueError, match=says):
        TOKENIZER.encode(caption)
    assert TOKENIZER.encode(caption, unknown="token").shape == (1, 36)
    words = split_words(caption)
    WordTokenizer(sorted(set(words))).encode(caption)  # words of other captions may stand anywhere


def test_words_of_backgrounds_and_of_both_are_accepted_where_they_belong():
    """The captions of scenes themselves are in test_tokenizer_round_trip."""
    TOKENIZER.encode(["on a grey background a plain ring", "checkered", "a red square with a sky backdrop"])
    TOKENIZER.encode(list(EXAMPLES))


def test_every_word_is_in_a_group():
    groups = word_groups(TOKENIZER.words)
    assert {word for group in groups.values() for word in group} == set(TOKENIZER.words)
    assert "checkered" not in groups["fills of objects"] and "checkered" in groups["textures of backgrounds"]
    assert word_groups([]) == {}


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
