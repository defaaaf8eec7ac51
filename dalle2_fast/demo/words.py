"""What the page shows of a tokenizer: captions to begin with, known words in groups, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle2_fast.data.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """What people may type.

    Args:
        examples: captions that the tokenizer reads.
        groups: heading -> words; empty where any text is read.
        rules: sentences about captions.
    """

    examples: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    rules: tuple[str, ...]


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Example:
        >>> from dalle2_fast.data import WordTokenizer
        >>> vocabulary_of(WordTokenizer(["a", "star"], context_length=8)).groups
        {'words': ('a', 'star')}
    """
    from dalle2_fast.data.synthetic.grammar import EXAMPLES, LIMITS, word_groups

    room = tokenizer.context_length - 2  # without the begin and the end token
    if getattr(tokenizer, "words", None) is None:
        rules = f"Any text is read, up to {room} byte pairs, which is about {room * 3 // 4} words of English."
        return Vocabulary((), {}, (rules,))
    rule = f"A caption has at most {room} words."
    if not tokenizer.of_scenes:
        return Vocabulary((), {"words": tuple(sorted(tokenizer.words))}, (rule,))
    known = set(tokenizer.words)
    examples = tuple(sentence for sentence in EXAMPLES if known.issuperset(sentence.split()))
    rules = tuple(f"{text[0].upper()}{text[1:]}." for text in LIMITS)
    return Vocabulary(examples, word_groups(tokenizer.words), (rule, *rules))
