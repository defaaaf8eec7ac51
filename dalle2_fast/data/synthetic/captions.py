"""English captions of scenes, as rows of tokens and without a Python string in between.

A caption is made in two steps. `draw_phrasing` samples what does not follow from the scene: which attributes
are stated, which synonym and which phrase are used. `stated` and `compose` then apply the phrasing to scenes.
One phrasing, applied to two scenes, gives two captions that differ only where the scenes differ: see
negatives.py.

Pattern: [opener] [count | a] [size] [fill] [colour] [shape] ... [relation | and] ... [position] [background].
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.scenes import Scenes
from dalle2_fast.data.synthetic.vocabulary import (
    BACKGROUND_PHRASES,
    BACKGROUNDS,
    BOS,
    COLOR_SYNONYMS,
    COLORS,
    COUNT,
    COUNTS,
    EOS,
    FILL_NOUNS,
    FILL_SYNONYMS,
    FILLS,
    INSIDE,
    MAX_LENGTH,
    MAX_OBJECTS,
    NAMED_OBJECTS,
    ONE,
    OPENERS,
    PLURAL_SYNONYMS,
    PLURALS,
    POSITION_PHRASES,
    RELATION_PHRASES,
    SHAPE_SYNONYMS,
    SHAPES,
    SIZE_SYNONYMS,
    SIZES,
    TEXTURES,
    THREE,
    TWO,
    WORD_TO_ID,
)


class _NounPhrase(NamedTuple):
    """Of one object per scene: the column of the synonym tables, and the order of the words."""

    color: Tensor  # int64 [n]
    shape: Tensor
    plural: Tensor
    size: Tensor
    fill: Tensor
    fill_after: Tensor  # bool [n]: "... with stripes" rather than "striped ..."
    color_first: Tensor  # bool [n]: "red striped" rather than "striped red"


class Phrasing(NamedTuple):
    """Everything about n captions that does not depend on the scenes; K = 5 object slots."""

    drop: float
    size: Tensor  # bool [n, K]: state the size?
    fill_seen: Tensor  # bool [n, K]: state a fill other than solid?
    fill_solid: Tensor  # bool [n, K]: state that it is solid?
    position: Tensor  # bool [n]
    background: Tensor
    texture: Tensor
    relation: Tensor
    texture_plain: Tensor  # bool [n]: state that the background is plain?
    nouns: tuple[_NounPhrase, ...]
    relation_phrase: Tensor  # int64 [n]
    position_phrase: Tensor
    background_phrase: Tensor
    opener: Tensor
    background_first: Tensor  # bool [n]

    def rows(self, index: Tensor) -> Phrasing:
        """The phrasing of some of the captions; `index`: int64 [m], repetitions allowed."""

        def take(value):
            if isinstance(value, _NounPhrase):
                return _NounPhrase(*(part[index] for part in value))
            if isinstance(value, tuple):
                return tuple(take(part) for part in value)
            return value[index] if isinstance(value, Tensor) else value

        return Phrasing(*(take(value) for value in self))


def _phrases(phrases: tuple[str, ...]) -> Tensor:
    """The tokens of phrases, int64 [phrases, longest], padded by 0."""
    rows = [[WORD_TO_ID[word] for word in phrase.split()] for phrase in phrases]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def _alternatives(phrases: tuple[tuple[str, ...], ...], width: int) -> Tensor:
    """The tokens of alternative phrases, int64 [entries, alternatives, width], padded by 0."""
    tables = [torch.nn.functional.pad(_phrases(group), (0, width))[:, :width] for group in phrases]
    return torch.stack(tables)


def _synonyms(names: tuple[str, ...], synonyms: dict[str, tuple[str, ...]]) -> Tensor:
    """int64 [names, choices]: the canonical name twice, then its synonyms, padded by the canonical name."""
    rows = [(name, name, *synonyms.get(name, (name,))) for name in names]
    choices = max(map(len, rows))
    rows = [row + (row[0],) * (choices - len(row)) for row in rows]
    return torch.tensor([[WORD_TO_ID[word] for word in row] for row in rows])


@functools.cache
def _tables(device: str | torch.device) -> dict[str, Tensor]:
    tables = dict(
        shape=_synonyms(SHAPES, SHAPE_SYNONYMS),
        plural=_synonyms(PLURALS, PLURAL_SYNONYMS),
        color=_synonyms(COLORS, COLOR_SYNONYMS),
        fill=_synonyms(FILLS, FILL_SYNONYMS),
        size=_synonyms(SIZES, SIZE_SYNONYMS),
        background=_phrases(BACKGROUNDS),
        texture=_phrases(TEXTURES),
        opener=_phrases(OPENERS),
        count=_phrases(COUNTS),
        relation=_alternatives(RELATION_PHRASES, 4),
        position=_alternatives(POSITION_PHRASES, 5),
        before_background=_phrases(tuple(before for before, _ in BACKGROUND_PHRASES)),
        after_background=_phrases(tuple(after for _, after in BACKGROUND_PHRASES)),
        fill_noun=torch.tensor([0] + [WORD_TO_ID[FILL_NOUNS[name]] for name in FILLS[1:]]),
    )
    return {name: table.to(device) for name, table in tables.items()}


def draw_phrasing(
    n: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    *,
    drop: float = 1.0,
    canonical: bool = False,
) -> Phrasing:
    """Sample the phrasing of n captions. The order of the random numbers is fixed.

    Args:
        n: how many captions.
        generator: on `device`; None takes torch's default generator.
        device: of the tensors.
        drop: 1 leaves attributes out at random, as people do; 0 states all of them.
        canonical: use no synonyms.

    Returns:
        The choices for each caption, tensors of n rows.

    Raises:
        ValueError: `drop` is neither 0 nor 1.

    Example:
        >>> draw_phrasing(4).opener.shape
        torch.Size([4])
    """
    if drop not in (0, 1):
        raise ValueError(f"drop: expected 0 (state everything) or 1 (leave out at random), got {drop!r}")
    tables = _tables(device)

    def bernoulli(chance: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device) < chance

    def integers(high: int) -> Tensor:
        return torch.randint(0, high, (n,), generator=generator, device=device)

    def synonym(table: str) -> Tensor:
        column = integers(tables[table].shape[1])
        return torch.zeros_like(column) if canonical else column

    attributes = dict(
        size=bernoulli(0.55, MAX_OBJECTS),
        fill_seen=bernoulli(0.92, MAX_OBJECTS),
        fill_solid=bernoulli(0.15, MAX_OBJECTS),
        position=bernoulli(0.7),
        background=bernoulli(0.6),
        texture=bernoulli(0.8),
        relation=bernoulli(0.88),
        texture_plain=bernoulli(0.15),
    )
    nouns = tuple(
        _NounPhrase(
            color=synonym("color"),
            shape=synonym("shape"),
            plural=synonym("plural"),
            size=synonym("size"),
            fill=synonym("fill"),
            fill_after=bernoulli(0.25),
            color_first=bernoulli(0.4),
        )
        for _ in range(NAMED_OBJECTS)
    )
    return Phrasing(
        drop=float(drop),
        **attributes,
        nouns=nouns,
        relation_phrase=integers(3),
        position_phrase=integers(3),
        background_phrase=integers(len(BACKGROUND_PHRASES)),
        opener=integers(len(OPENERS)),
        background_first=bernoulli(0.15),
    )


def stated(scenes: Scenes, phrasing: Phrasing) -> dict[str, Tensor]:
    """Which attributes the captions of scenes state.

    Args:
        scenes: n scenes.
        phrasing: the phrasing of their captions.

    Returns:
        bool tensors: size, fill [n, K]; pos, bg, btex, rel [n]. Shape and colour are always stated.

    Example:
        >>> from dalle2_fast.data import sample_scenes
        >>> stated(sample_scenes(4), draw_phrasing(4, drop=0.0))["bg"].all()
        tensor(True)
    """
    kind, seen, everything = scenes["kind"], scenes["fill"] > 0, phrasing.drop == 0
    fill = torch.where(seen, phrasing.fill_seen, phrasing.fill_solid)
    background = phrasing.background | everything
    texture = (phrasing.texture | everything) & background & (scenes["btex"] > 0)
    return dict(
        size=(phrasing.size | everything) & (kind != THREE)[:, None],
        fill=fill | seen if everything else fill,
        pos=(phrasing.position | everything) & (kind == ONE),
        bg=background,
        btex=texture | ((phrasing.texture | everything) & background & phrasing.texture_plain),
        rel=(phrasing.relation | everything) & (kind == TWO),
    )


def compose(scenes: Scenes, phrasing: Phrasing) -> Tensor:
    """The captions of n scenes as token ids.

    Args:
        scenes: n scenes.
        phrasing: the phrasing of their captions.

    Returns:
        int64 [n, 36]: <bos>, the words, <eos>, then 0.

    Example:
        >>> from dalle2_fast.data import WordTokenizer, World, sample_scenes
        >>> world = World(shapes=["star"], colors=["red"], fills=["solid"], sizes=["small"], kinds=["one"])
        >>> scenes = sample_scenes(1, split="all", world=world)
        >>> tokens = compose(scenes, draw_phrasing(1, canonical=True))
        >>> "red" in WordTokenizer.scenes().decode(tokens[0]), tokens.shape
        (True, torch.Size([1, 36]))
    """
    device, kind, n = scenes["kind"].device, scenes["kind"], len(scenes["kind"])
    tables, says = _tables(device), stated(scenes, phrasing)
    counted = kind == COUNT

    def only(where: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(where[:, None], tokens, 0)

    def constant(token: int) -> Tensor:
        return torch.full((n, 1), token, device=device)

    def noun_phrase(slot: int) -> Tensor:  # [n, 7]
        choice, fill = phrasing.nouns[slot], scenes["fill"][:, slot]
        color = tables["color"][scenes["color"][:, slot], choice.color]
        singular = tables["shape"][scenes["shape"][:, slot], choice.shape]
        plural = tables["plural"][scenes["shape"][:, slot], choice.plural]
        article = torch.where(counted, tables["count"][scenes["nobj"], 0], WORD_TO_ID["a"])
        size = torch.where(says["size"][:, slot], tables["size"][scenes["size"][:, slot], choice.size], 0)
        after = choice.fill_after & (fill > 0)
        fill_word = torch.where(says["fill"][:, slot] & ~after, tables["fill"][fill, choice.fill], 0)
        with_stripes = says["fill"][:, slot] & after
        adjectives = (
            torch.where(choice.color_first, color, fill_word),
            torch.where(choice.color_first, fill_word, color),
        )
        shape = torch.where(counted, plural, singular)
        with_ = torch.where(with_stripes, WORD_TO_ID["with"], 0)
        stripes = torch.where(with_stripes, tables["fill_noun"][fill], 0)
        return torch.stack([article, size, *adjectives, shape, with_, stripes], 1)

    nouns = [noun_phrase(slot) for slot in range(NAMED_OBJECTS)]
    inside = (scenes["rel"] == INSIDE)[:, None]  # slot 1 lies in slot 0, and is named first
    first, second = torch.where(inside, nouns[1], nouns[0]), torch.where(inside, nouns[0], nouns[1])
    and_ = constant(WORD_TO_ID["and"])
    relation = only(says["rel"], tables["relation"][scenes["rel"].clamp_min(0), phrasing.relation_phrase])
    position = only(says["pos"], tables["position"][scenes["pos"].clamp_min(0), phrasing.position_phrase])
    background = [
        tables["before_background"][phrasing.background_phrase],
        only(says["btex"], tables["texture"][scenes["btex"]]),
        tables["background"][scenes["bg"]],
        tables["after_background"][phrasing.background_phrase],
    ]
    background = only(says["bg"], torch.cat(background, 1))
    two, three = kind == TWO, kind == THREE
    body = [
        tables["opener"][phrasing.opener],
        first,
        relation,
        only(two & ~says["rel"], and_),
        only(two, second),
        only(three, nouns[1]),
        only(three, and_),
        only(three, nouns[2]),
        position,
    ]
    early = phrasing.background_first
    parts = [constant(BOS), only(early, background), *body, only(~early, background), constant(EOS)]
    tokens = torch.cat(parts, 1)
    order = torch.argsort((tokens == 0).int(), dim=1, stable=True)  # words first, in their order
    return torch.gather(tokens, 1, order)[:, :MAX_LENGTH]


def make_captions(
    scenes: Scenes,
    generator: torch.Generator | None = None,
    drop: float = 1.0,
    canonical: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sample a phrasing, and caption scenes with it.

    Args:
        scenes: n scenes.
        generator: on the device of the scenes; None takes torch's default generator.
        drop: 1 leaves attributes out at random, as people do; 0 states all of them.
        canonical: use no synonyms.

    Returns:
        The tokens, int64 [n, 36], and which attributes they state (see `stated`).

    Raises:
        ValueError: `drop` is neither 0 nor 1.

    Example:
        >>> from dalle2_fast.data import sample_scenes
        >>> tokens, says = make_captions(sample_scenes(2))
        >>> tokens.shape, says["size"].shape
        (torch.Size([2, 36]), torch.Size([2, 5]))
    """
    device = scenes["kind"].device
    phrasing = draw_phrasing(len(scenes["kind"]), generator, device, drop=drop, canonical=canonical)
    return compose(scenes, phrasing), stated(scenes, phrasing)
