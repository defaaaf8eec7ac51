"""Captions that people write: what no scene shows is refused with the reason, and nothing else is."""

from __future__ import annotations

import pytest

from dalle2_fast.data.synthetic.captions import compose, draw_phrasing
from dalle2_fast.data.synthetic.grammar import EXAMPLES
from dalle2_fast.data.synthetic.meaning import check_meaning
from dalle2_fast.data.synthetic.negatives import sample_negatives
from dalle2_fast.data.synthetic.scenes import sample_scenes
from dalle2_fast.data.text.tokenizer import WordTokenizer
from tests.support.seeded import generator


def test_no_caption_of_a_scene_is_refused():
    """Catches: a rule that is stricter than the generator, for which evaluation would then fail."""
    words = WordTokenizer.scenes()
    for split in ("all", "comp"):
        scenes, phrasing = sample_scenes(800, generator(1), split), draw_phrasing(800, generator(2))
        negatives, mask, _ = sample_negatives(scenes, phrasing, generator(3), count=1, split=split)
        for row in [*compose(scenes, phrasing), *negatives[mask]]:
            check_meaning(words.decode(row).split())
    for caption in EXAMPLES:
        check_meaning(caption.split())


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a red square checkered", '"checkered" after an object: .* only a background'),
        ("the square is mint on a white background", '"mint" after an object'),
        ("a red square with blue stripes", '"blue" before "stripes": stripes have a tone of the object'),
        ("a red square on a white background with dots", 'say "dotted" before its colour'),
        ("a circle and a square and a star and a heart", "up to 3 objects, got 4"),
        ("two circles and a square", '"circles" and another object: a caption either counts'),
        ("a white circle on a white background", '"white" for "circle": it would hardly be visible'),
    ],
)
def test_what_no_scene_shows_is_refused_with_the_reason(caption, reason):
    """Catches: an image of something else instead of an answer."""
    with pytest.raises(ValueError, match=reason):
        check_meaning(caption.split())


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle on navy",
        "in a picture of a circle a star",
        "checkered",
        "a red circle in a white background",
        "a striped star",
        "a large circle above a square",
        "a circle in the center on a background of beige",
        "a red square with stripes",
        "a black star on a white background",
        "a striped crescent",
        "a small white circle inside a large blue star",
        "four large stars",
    ],
)
def test_free_wording_is_accepted(caption):
    """Catches: rules about the wording, where what is asked for is possible."""
    check_meaning(caption.split())
