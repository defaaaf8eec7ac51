"""What the words of the scenes are said of, for a reader. `meaning` checks the captions that people write."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from dalle2_fast.data.synthetic import vocabulary as v


def _with_synonyms(names: Collection[str], *synonyms: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Each name, followed by its synonyms."""
    return tuple(word for name in names for word in (name, *(s for t in synonyms for s in t.get(name, ()))))


_COLORS = _with_synonyms(v.COLORS, v.COLOR_SYNONYMS)
_FILLS = _with_synonyms(v.FILLS, v.FILL_SYNONYMS)
_SIZES = _with_synonyms(v.SIZES, v.SIZE_SYNONYMS)

# Sentences that show how words are put together, for a reader of the vocabulary.
EXAMPLES = (
    "a large red circle above a small blue square on a navy background",
    "three green stars",
    "a yellow heart with stripes in the top left corner",
    "a dotted purple hexagon on a checkered mint background",
    "a small white star inside a large blue circle",
    "a red circle and a blue square against a black backdrop",
    "a red circle on a gray background",
)

# What no scene shows, and why, for a reader of the vocabulary.
LIMITS = (
    "an object is never what only backgrounds are, such as checkered; stripes and dots have no colour named",
    "stripes and dots of a background stand before its colour: on a striped white background",
    "a caption either counts two to five equal objects, or names one, two or three",
    "no object has a colour that its background hides, such as white on white or gray on sky",
)


def word_groups(words: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Words of the scenes by what they are said of; a word may be in several groups.

    Args:
        words: some or all of the words, such as those that a checkpoint knows.

    Returns:
        heading -> the words of that group, in the order of the vocabulary. No group is empty.

    Example:
        >>> word_groups(["red", "navy", "star"])
        {'shapes': ('star',), 'colours of objects': ('red',), 'colours of backgrounds': ('navy',)}
    """
    counts = v.COUNTS[2:]
    groups: dict[str, Collection[str]] = {
        "shapes": _with_synonyms(v.SHAPES, v.SHAPE_SYNONYMS),
        "several": counts + _with_synonyms(v.PLURALS, v.PLURAL_SYNONYMS),
        "sizes": _SIZES,
        "colours of objects": _COLORS,
        "fills of objects": _FILLS + tuple(v.FILL_NOUNS.values()),
        "relations": _words_of(phrase for group in v.RELATION_PHRASES for phrase in group),
        "positions": _words_of(phrase for group in v.POSITION_PHRASES for phrase in group),
        "colours of backgrounds": v.BACKGROUNDS,
        "textures of backgrounds": v.TEXTURES,
        "words for backgrounds": _words_of(part for pair in v.BACKGROUND_PHRASES for part in pair),
    }
    known = set(words)
    listed = {word for group in groups.values() for word in group}
    groups["others"] = [word for word in words if word not in listed]
    found = {name: tuple(word for word in group if word in known) for name, group in groups.items()}
    return {name: group for name, group in found.items() if group}


def _words_of(phrases: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split()))
