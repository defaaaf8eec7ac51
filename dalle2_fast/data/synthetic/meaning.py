"""A check of captions that people write: what no scene shows, the images would not show either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dalle2_fast.data.synthetic import vocabulary as v
from dalle2_fast.data.synthetic.captions import NAMED_OBJECTS
from dalle2_fast.data.synthetic.palette import palette
from dalle2_fast.data.synthetic.shapes import geometry
from dalle2_fast.data.synthetic.world import OUTER_SHAPES


def _indices(names: Sequence[str], *synonyms: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Word -> index of its canonical name."""
    return {
        word: index
        for index, name in enumerate(names)
        for word in (name, *(other for table in synonyms for other in table.get(name, ())))
    }


COLORS = _indices(v.COLORS, v.COLOR_SYNONYMS)
FILLS = _indices(v.FILLS, v.FILL_SYNONYMS)
SIZES = _indices(v.SIZES, v.SIZE_SYNONYMS)
BACKGROUNDS = _indices(v.BACKGROUNDS, v.COLOR_SYNONYMS)
TEXTURES = _indices(v.TEXTURES, v.FILL_SYNONYMS)
PLURALS = _indices(v.PLURALS, v.PLURAL_SYNONYMS)
OBJECTS = _indices(v.SHAPES, v.SHAPE_SYNONYMS) | PLURALS
BACKGROUND_NOUNS = frozenset(after for _, after in v.BACKGROUND_PHRASES)
PATTERNS = {noun: v.FILLS.index(fill) for fill, noun in v.FILL_NOUNS.items()}

_OF_OBJECTS = frozenset([*COLORS, *FILLS, *SIZES])
_OF_BACKGROUNDS = frozenset([*BACKGROUNDS, *TEXTURES])
_BEFORE_BACKGROUNDS = frozenset(["on", "against", "over", "of"])
_ARTICLES = frozenset(["a", "an", "the"])
_WITHIN = frozenset(["inside", "within"])


class _Object(NamedTuple):
    """A noun phrase: the noun, the indices of what is said of it, -1 for nothing, and what holds it."""

    word: str
    shape: int
    color: int
    fill: int
    size: int
    holds: bool  # the one before it lies inside it


def check_meaning(words: Sequence[str]) -> None:
    """Raise ValueError, with the reason, if a caption asks for what no scene shows.

    Args:
        words: those of a caption, in lower case.

    Raises:
        ValueError: a word of backgrounds is said of an object or the reverse; stripes have a colour or are on
            a shape that is too thin for them; too many or too large objects are named; an object is inside
            one that holds none; or an object has a colour that its background hides.

    Example:
        >>> check_meaning("a cyan square on a checkered navy background".split())
    """
    objects, background = _parse(words)
    _check_objects(objects)
    for thing in objects:
        _check_object(thing)
        if background >= 0 and thing.color >= 0:
            visible = palette().allowed[thing.color, :, background]
            if not (visible[thing.fill] if thing.fill >= 0 else visible.any()):
                fill = f"{v.FILLS[thing.fill]} " if thing.fill > v.SOLID else ""
                raise ValueError(
                    f'"{fill}{v.COLORS[thing.color]}" for "{thing.word}": it would hardly be visible on a '
                    f"{v.BACKGROUNDS[background]} background; choose another colour for one of them"
                )


def _parse(words: Sequence[str]) -> tuple[list[_Object], int]:
    """The objects in the order of the caption, and the colour of the background, -1 for none."""
    objects: list[_Object] = []
    background, begin = -1, 0  # begin: of the adjectives that lead to the word
    named = any(word in OBJECTS for word in words)
    of_background = False  # is the last noun a background?
    holds = False
    for place, word in enumerate([*words, ""]):
        if word in _OF_OBJECTS or word in _OF_BACKGROUNDS:
            continue
        adjectives = words[begin:place]
        if word in OBJECTS:
            _refuse_others(adjectives, _OF_OBJECTS, word, "a background", "an object")
            found = [_last(adjectives, table) for table in (COLORS, FILLS, SIZES)]
            objects.append(_Object(word, OBJECTS[word], *found, holds and bool(objects)))
            of_background = holds = False
        elif word in BACKGROUND_NOUNS:
            _refuse_others(adjectives, _OF_BACKGROUNDS, word, "an object", "a background")
            background, of_background, holds = _last(adjectives, BACKGROUNDS), True, False
        elif word in PATTERNS and objects:
            if adjectives:
                raise ValueError(
                    f'"{" ".join(adjectives)}" before "{word}": {word} have a tone of the object\'s colour; '
                    "captions give them no other one and no size"
                )
            if of_background:
                name = v.FILLS[PATTERNS[word]]
                raise ValueError(
                    f'"{word}" after the background: say "{name}" before the colour of the background'
                )
            objects[-1] = objects[-1]._replace(fill=PATTERNS[word])
        elif named and _preposition(words, begin) not in _BEFORE_BACKGROUNDS:
            stray = [each for each in adjectives if each not in _OF_OBJECTS]
            if stray:
                raise ValueError(_only_said_of(stray, "after an object", "a background", "an object"))
        following = words[place + 1 : place + 2]
        holds |= word in _WITHIN or (word == "in" and following in (["a"], ["an"]))
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


def _check_objects(objects: Sequence[_Object]) -> None:
    """Refuse more objects, or larger ones, than a scene has."""
    plural = [thing.word for thing in objects if thing.word in PLURALS]
    if plural and len(objects) > 1:
        raise ValueError(
            f'"{plural[0]}" and another object: a caption either counts equal objects or names up to '
            f"{NAMED_OBJECTS} single ones"
        )
    if len(objects) > NAMED_OBJECTS:
        raise ValueError(f"a caption names up to {NAMED_OBJECTS} objects, got {len(objects)}")
    large = [thing.word for thing in objects if thing.size == v.LARGE]
    if len(large) > 1 or (large and (plural or len(objects) > 2)):
        raise ValueError(
            f'"large" for "{large[-1]}": there is no room; one of two objects may be large, but none of '
            "three, and none of several equal ones"
        )
    for inner, outer in zip(objects, objects[1:], strict=False):
        if not outer.holds:
            continue
        if v.SHAPES[outer.shape] not in OUTER_SHAPES:
            raise ValueError(
                f'inside "{outer.word}": only {", ".join(OUTER_SHAPES)} are wide enough to hold an object'
            )
        if inner.fill > v.SOLID or outer.fill > v.SOLID:
            raise ValueError(
                f'"{inner.word}" inside "{outer.word}": both are solid, because stripes and dots would hide '
                "where one ends"
            )


def _check_object(thing: _Object) -> None:
    """Refuse stripes and dots where they do not show."""
    if thing.fill > v.SOLID:
        sizes = [thing.size] if thing.size >= 0 else list(range(len(v.SIZES)))
        if not geometry().fill_visible[thing.shape, sizes].any():
            name = f"a small {v.SHAPES[thing.shape]}" if thing.size >= 0 else f"a {v.SHAPES[thing.shape]}"
            raise ValueError(
                f'"{v.FILLS[thing.fill]}" for "{thing.word}": {name} is too thin for it, and is always solid'
            )
