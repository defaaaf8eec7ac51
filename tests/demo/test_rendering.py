"""The parts of the page that are plain HTML."""

from __future__ import annotations

import re

import pytest
import torch

from dalle2_fast.data import BPETokenizer, WordTokenizer
from dalle2_fast.demo import rendering
from dalle2_fast.demo.fields import FieldError, attribute, seed_of, sentence, whole_number
from dalle2_fast.demo.words import vocabulary_of

HOSTILE = "<img src=x onerror=alert(1)>"


def test_what_people_type_is_escaped():
    """Catches: a caption that runs as a script in the error about it."""
    for html in (
        rendering.error(HOSTILE), rendering.words({HOSTILE: [HOSTILE]}, [HOSTILE]),
        rendering.purpose(HOSTILE), rendering.header([HOSTILE]), rendering.examples([HOSTILE]),
        rendering.seconds({HOSTILE: 1.0}, 1.0, HOSTILE),
    ):  # fmt: skip
        assert "<img" not in html and "&lt;img" in html


def test_errors_are_sentences_of_bounded_length():
    assert sentence("expected\n words") == "Expected words."
    assert len(sentence("word " * 10_000)) < 600


def test_an_error_of_the_pipeline_goes_to_the_field_that_it_names():
    assert attribute(ValueError("size: expected 64, got 3"), {"size": 0}, "run").field == "size"
    other = attribute(RuntimeError("CUDA: out of memory"), {"size": 0}, "run")
    assert (other.field, str(other)) == ("run", "CUDA: out of memory")
    assert str(attribute(KeyError(), {}, "run")) == "KeyError"


def test_numbers_that_browsers_send():
    assert whole_number("n", 4.0, 1, 9) == 4
    for value in (None, 4.5, "4", True, float("nan"), float("inf"), 10):
        with pytest.raises(FieldError):
            whole_number("n", value, 1, 9)
    assert seed_of("seed", str(2**63 - 4), 4) == 2**63 - 4  # a browser's number would round it
    for text in (str(2**63 - 3), "-1", "1e3", "\u0663", "7 8"):
        with pytest.raises(FieldError):
            seed_of("seed", text, 4)


def test_a_preview_has_a_place_for_each_picture_and_its_candidates():
    """Catches: candidates that are shown as pictures, which the page then loses."""
    html = rendering.preview(torch.rand(6, 3, 8, 8), candidates=2)
    cells = re.findall(r'<div style="grid-template-columns:repeat\(2', html)
    assert html.count("<img") == 6 and len(cells) == 3
    rows = torch.rand(6, 3, 8, 8)
    counts = [rendering.candidates_of(rows, pictures) for pictures in (3, 6, 4, None)]
    assert counts == [2, 1, 1, 1] and rendering.candidates_of(None, 3) == 1


def test_seconds_add_up():
    """Catches: a bar that is longer than its frame, and time that no stage accounts for and nobody sees."""
    html = rendering.seconds({"prior": 1.0, "decoder": 2.0}, 4.0)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", html)]
    assert widths == [25.0, 50.0, 25.0]
    assert "rest <span>1.00 s" in html and "<span>4.00 s</span> in all" in html


def test_vocabularies():
    """Catches: an example that its tokenizer refuses."""
    scenes = WordTokenizer(vocabulary_table(), context_length=36)
    vocabulary = vocabulary_of(scenes)
    assert "shapes" in vocabulary.groups and "34 words" in vocabulary.rules[0]
    scenes.encode(list(vocabulary.examples))
    assert vocabulary.examples
    any_text = vocabulary_of(BPETokenizer())
    assert not any_text.groups and not any_text.examples and "Any text" in any_text.rules[0]


def vocabulary_table() -> tuple[str, ...]:
    from dalle2_fast.data.synthetic.vocabulary import SPECIALS, WORDS

    return WORDS[len(SPECIALS) :]
