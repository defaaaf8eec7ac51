"""The words that the captions of a world can contain."""

from __future__ import annotations

from dalle2_fast.data.synthetic import vocabulary as v
from dalle2_fast.data.synthetic.world import World


def scene_words(world: World | None = None) -> tuple[str, ...]:
    """Every word that captions of a world use, in the order of the token ids.

    Args:
        world: None takes the whole world.

    Returns:
        The words, each once.

    Example:
        >>> words = scene_words()
        >>> len(words), words[:3]
        (119, ('circle', 'square', 'triangle'))
    """
    world = world or World()
    phrases = ["a", *v.OPENERS, *world.backgrounds, *world.textures]
    phrases += [part for pair in v.BACKGROUND_PHRASES for part in pair]

    def add(names: tuple[str, ...], synonyms: dict[str, tuple[str, ...]]) -> None:
        phrases.extend(names)
        phrases.extend(word for name in names for word in synonyms.get(name, ()))

    add(world.shapes, v.SHAPE_SYNONYMS)
    add(world.colors, v.COLOR_SYNONYMS)
    add(world.fills, v.FILL_SYNONYMS)
    add(world.sizes, v.SIZE_SYNONYMS)
    for fill in world.fills:
        if fill in v.FILL_NOUNS:
            phrases += ["with", v.FILL_NOUNS[fill]]
    if "one" in world.kinds:
        phrases += [phrase for group in v.POSITION_PHRASES for phrase in group]
    if {"two", "three"} & set(world.kinds):
        phrases.append("and")
    if "two" in world.kinds:
        chosen = [v.RELATION_PHRASES[v.RELATIONS.index(name)] for name in world.relations]
        phrases += [phrase for group in chosen for phrase in group]
    if "count" in world.kinds:
        phrases += v.COUNTS[2:] if "small" in world.sizes else v.COUNTS[2:-1]  # five must be small
        plurals = tuple(v.PLURALS[v.SHAPES.index(name)] for name in world.shapes)
        add(plurals, v.PLURAL_SYNONYMS)
    reachable = {word for phrase in phrases for word in phrase.split()}
    return tuple(word for word in v.WORDS if word in reachable)
