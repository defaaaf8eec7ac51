"""A check of captions that people write: what no scene shows, and the images would not show either.

A caption is not refused for being new: the trained decoder drew striped crescents, circles inside stars, four
large stars, which no scene has. It is refused where the decoder drew something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dalle2_fast.data.synthetic import vocabulary as v
from dalle2_fast.data.synthetic.vocabulary import NAMED_OBJECTS


def _indices(names: Sequence[str], synonyms: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Word -> index of its canonical name."""
    return {word: index for index, name in enumerate(names) for word in (name, *synonyms.get(name, ()))}


COLORS = _indices(v.COLORS, v.COLOR_SYNONYMS)
FILLS = _indices(v.FILLS, v.FILL_SYNONYMS)
SIZES = _indices(v.SIZES, v.SIZE_SYNONYMS)
BACKGROUNDS = _indices(v.BACKGROUNDS, v.COLOR_SYNONYMS)
TEXTURES = _indices(v.TEXTURES, v.FILL_SYNONYMS)
PLURALS = _indices(v.PLURALS, v.PLURAL_SYNONYMS)
OBJECTS = _indices(v.SHAPES, v.SHAPE_SYNONYMS) | PLURALS
BACKGROUND_NOUNS = frozenset(after for _, after in v.BACKGROUND_PHRASES)
PATTERNS = {noun: fill for fill, noun in v.FILL_NOUNS.items()}

_OF_OBJECTS = frozenset([*COLORS, *FILLS, *SIZES])
_OF_BACKGROUNDS = frozenset([*BACKGROUNDS, *TEXTURES])
_BEFORE_BACKGROUNDS = frozenset(["on", "against", "over", "of"])
_ARTICLES = frozenset(["a", "an", "the"])


class _Object(NamedTuple):
    """A noun, and the colour that is said of it, as an index; -1 for none."""

    word: str
    color: int


def check_meaning(words: Sequence[str]) -> None:
    """Raise ValueError, with the reason, if a caption asks for what no scene shows.

    Args:
        words: those of a caption, in lower case.

    Raises:
        ValueError: a word of backgrounds is said of an object or the reverse; stripes or dots have a colour
            or come after the background; too many objects are named, or counted ones and others; or an object
            has a colour that its background hides.

    Example:
        >>> check_meaning("a cyan square on a checkered navy background".split())
    """
    objects, background = _parse(words)
    counted = [thing.word for thing in objects if thing.word in PLURALS]
    if counted and len(objects) > 1:
        raise ValueError(
            f'"{counted[0]}" and another object: a caption either counts equal objects or names up to '
            f"{NAMED_OBJECTS} single ones"
        )
    if len(objects) > NAMED_OBJECTS:
        raise ValueError(f"a caption names up to {NAMED_OBJECTS} objects, got {len(objects)}")
    for thing in objects:
        if min(background, thing.color) >= 0 and not _visible(thing.color, background):
            raise ValueError(
                f'"{v.COLORS[thing.color]}" for "{thing.word}": it would hardly be visible on a '
                f"{v.BACKGROUNDS[background]} background; choose another colour for one of them"
            )


def _visible(color: int, background: int) -> bool:
    from dalle2_fast.data.synthetic.palette import (
        palette,  # needs torch, which other captions do not wait for
    )

    return bool(palette().allowed[color, v.SOLID, background])


def _parse(words: Sequence[str]) -> tuple[list[_Object], int]:
    """The objects in the order of the caption, and the colour of the background, -1 for none."""
    objects: list[_Object] = []
    background, begin = -1, 0  # begin: of the adjectives that lead to the word
    named = any(word in OBJECTS for word in words)
    of_background = False  # is the last noun a background?
    for place, word in enumerate([*words, ""]):
        if word in _OF_OBJECTS or word in _OF_BACKGROUNDS:
            continue
        adjectives = words[begin:place]
        if word in OBJECTS:
            _refuse_others(adjectives, _OF_OBJECTS, word, "a background", "an object")
            objects.append(_Object(word, _last(adjectives, COLORS)))
            of_background = False
        elif word in BACKGROUND_NOUNS:
            _refuse_others(adjectives, _OF_BACKGROUNDS, word, "an object", "a background")
            background, of_background = _last(adjectives, BACKGROUNDS), True
        elif word in PATTERNS and objects:
            if adjectives:
                raise ValueError(
                    f'"{" ".join(adjectives)}" before "{word}": {word} have a tone of the object\'s colour; '
                    "captions give them no other one and no size"
                )
            if of_background:
                raise ValueError(
                    f'"{word}" after the background: say "{PATTERNS[word]}" before its colour'
                )
        elif named and _preposition(words, begin) not in _BEFORE_BACKGROUNDS:
            stray = [each for each in adjectives if each not in _OF_OBJECTS]
            if stray:
                raise ValueError(_only_said_of(stray, "after an object", "a background", "an object"))
        begin = place + 1
    return objects, background


def _preposition(words: Sequence[str], begin: int) -> str:
    """The word before adjectives, and before their article."""
    while begin and words[begin - 1] in _ARTICLES:
        begin -= 1
    return words[begin - 1] if begin else ""


def _last(adjectives: Sequence[str], table: dict[str, int]) -> int:
    return next((table[word] for word in reversed(adjectives) if word in table), -1)


def _refuse_others(
    adjectives: Sequence[str], allowed: frozenset[str], noun: str, only: str, never: str
) -> None:
    wrong = [word for word in adjectives if word not in allowed]
    if wrong:
        raise ValueError(_only_said_of(wrong, f'before "{noun}"', only, never))


def _only_said_of(words: Sequence[str], where: str, only: str, never: str) -> str:
    names = ", ".join(f'"{word}"' for word in words)
    return (
        f"{names} {where}: in the captions that this checkpoint knows, only {only} is said to be that, never "
        f"{never} (`dalle2-fast vocabulary` lists the words of each)"
    )
