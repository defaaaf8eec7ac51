"""World: the part of the vocabulary that scenes are sampled from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch

from dalle2_fast.data.synthetic.vocabulary import (
    BACKGROUNDS,
    COLORS,
    FILLS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
)

FILL_WEIGHTS = (0.6, 0.2, 0.2)
RELATION_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 0.6)
TEXTURE_WEIGHTS = (0.4, 0.15, 0.15, 0.15, 0.15)
KIND_WEIGHTS = (0.30, 0.35, 0.20, 0.15)

REWEIGHTED = ("shapes", "fills", "sizes", "textures", "kinds", "relations")
OUTER_SHAPES = ("circle", "square", "pentagon", "hexagon")  # large enough inside for another object


class World:
    """A choice of names per attribute; scenes use nothing outside of it.

    None means every name that the other choices leave possible.

    Args:
        shapes: of objects, names of SHAPES.
        colors: of objects, names of COLORS.
        fills: of objects: "solid", "striped", "dotted".
        sizes: of objects: "small", "medium", "large".
        backgrounds: colours of the background, names of BACKGROUNDS.
        textures: of the background, names of TEXTURES.
        kinds: of scenes: "one" object somewhere, "two" in a relation, "count" two to five alike, "three"
            different ones.
        relations: of scenes of "two": "left", "right", "above", "below", "inside".

    Raises:
        TypeError: a choice is a single string.
        ValueError: a name does not exist, a choice is empty, or a kind or relation is impossible with the
            other choices ("inside" needs a large outer object and a small inner one).

    Example:
        >>> world = World(shapes=["star", "ring"], kinds=["one"])
        >>> world
        World(shapes=['star', 'ring'], kinds=['one'], relations=['left', 'right', 'above', 'below'])
    """

    def __init__(
        self,
        shapes: Sequence[str] | None = None,
        colors: Sequence[str] | None = None,
        fills: Sequence[str] | None = None,
        sizes: Sequence[str] | None = None,
        backgrounds: Sequence[str] | None = None,
        textures: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
        relations: Sequence[str] | None = None,
    ) -> None:
        self._on_devices: dict[tuple[str, str, str], torch.Tensor] = {}
        self.factors: dict[str, dict[str, float]] = {}  # see `reweighted`
        self.shapes = _choice("shapes", shapes, SHAPES)
        self.colors = _choice("colors", colors, COLORS)
        self.fills = _choice("fills", fills, FILLS)
        self.sizes = _choice("sizes", sizes, SIZES)
        self.backgrounds = _choice("backgrounds", backgrounds, BACKGROUNDS)
        self.textures = _choice("textures", textures, TEXTURES)
        impossible_relations = {} if (reason := self._why_not_inside()) is None else {"inside": reason}
        self.relations = _possible("relations", relations, RELATIONS, impossible_relations)
        impossible_kinds = {}
        if not {"small", "medium"} & set(self.sizes):  # two large objects do not fit on the canvas
            reason = 'it needs the size "small" or "medium"'
            impossible_kinds = dict.fromkeys(("two", "count", "three"), reason)
        self.kinds = _possible("kinds", kinds, KINDS, impossible_kinds)

    def _why_not_inside(self) -> str | None:
        if not set(OUTER_SHAPES) & set(self.shapes):
            return f"it needs a shape of {', '.join(OUTER_SHAPES)}"
        if not {"small", "large"} <= set(self.sizes):
            return 'it needs the sizes "small" and "large"'
        return None if "solid" in self.fills else 'it needs the fill "solid"'

    def reweighted(self, factors: Mapping[str, Mapping[str, float]]) -> World:
        """The same world, of which some names are sampled more often, or less often, in training.

        What scenes may show stays: the two worlds are equal and have the same config.

        Args:
            factors: attribute -> name -> factor on its weight, > 0. Of "shapes", "fills", "sizes",
                "textures", "kinds" and "relations".

        Raises:
            ValueError: an attribute has no weights, a name is not one of the world's, or a factor is not > 0.

        Example:
            >>> world = World().reweighted({"kinds": {"three": 2.0}})
            >>> world == World(), world.weights("kinds")[-1].item() / World().weights("kinds")[-1].item()
            (True, 2.0)
        """
        for attribute, names in factors.items():
            if attribute not in REWEIGHTED:
                raise ValueError(f"factors: expected keys of {', '.join(REWEIGHTED)}, got {attribute!r}")
            for name, factor in names.items():
                if name not in getattr(self, attribute):
                    known = ", ".join(getattr(self, attribute))
                    raise ValueError(f"factors: expected {attribute} of {known}; got {name!r}")
                if not factor > 0:
                    raise ValueError(f"factors: expected numbers > 0, got {factor!r} for {name!r}")
        other = copy.copy(self)
        other._on_devices, other.factors = {}, {key: dict(names) for key, names in factors.items()}
        return other

    def ids(self, attribute: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The chosen names of an attribute ("shapes", "colors", ...) as indices into its table, int64."""
        return self._cached(self._ids, attribute, device)

    def weights(self, attribute: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """How often each name of an attribute is sampled, float32 [full table]; 0 outside of the world."""
        return self._cached(self._weights, attribute, device)

    def _cached(self, make: Callable, attribute: str, device: torch.device | str) -> torch.Tensor:
        """`make(attribute)` on the device, copied once, because every copy makes the host wait for a GPU."""
        if torch.device(device).type == "cpu":
            return make(attribute)
        key = make.__name__, attribute, str(device)
        if key not in self._on_devices:
            self._on_devices[key] = make(attribute).to(device)
        return self._on_devices[key]

    def _ids(self, attribute: str) -> torch.Tensor:
        return torch.tensor([_TABLES[attribute].index(name) for name in getattr(self, attribute)])

    def _weights(self, attribute: str) -> torch.Tensor:
        factors = dict.fromkeys(getattr(self, attribute), 1.0) | self.factors.get(attribute, {})
        chosen = torch.tensor([factors.get(name, 0.0) for name in _TABLES[attribute]])
        return chosen * torch.tensor(_WEIGHTS.get(attribute, (1.0,) * len(chosen)))

    def to_config(self) -> dict[str, list[str]]:
        """A JSON-able dict; `World(**config)` and `World.from_config(config)` rebuild the world.

        Example:
            >>> World(kinds=["one"]).to_config()["kinds"]
            ['one']
        """
        return {attribute: list(getattr(self, attribute)) for attribute in _TABLES}

    @classmethod
    def from_config(cls, config: dict) -> World:
        """Rebuild a world from `to_config()`; ValueError for other keys."""
        unknown = sorted(set(config) - set(_TABLES))
        if unknown:
            raise ValueError(f"world: expected keys of {sorted(_TABLES)}, got {unknown}")
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, World) and self.to_config() == other.to_config()

    def __repr__(self) -> str:
        restricted = [name for name in _TABLES if getattr(self, name) != _TABLES[name]]
        return f"World({', '.join(f'{name}={list(getattr(self, name))}' for name in restricted)})"


_TABLES = {
    "shapes": SHAPES,
    "colors": COLORS,
    "fills": FILLS,
    "sizes": SIZES,
    "backgrounds": BACKGROUNDS,
    "textures": TEXTURES,
    "kinds": KINDS,
    "relations": RELATIONS,
}
_WEIGHTS = {
    "fills": FILL_WEIGHTS,
    "relations": RELATION_WEIGHTS,
    "textures": TEXTURE_WEIGHTS,
    "kinds": KIND_WEIGHTS,
}


def _choice(argument: str, names: Sequence[str] | None, table: tuple[str, ...]) -> tuple[str, ...]:
    if names is None:
        return table
    if isinstance(names, str):
        raise TypeError(f"{argument}: expected a sequence of names, got the single string {names!r}")
    names = tuple(dict.fromkeys(names))
    unknown = [name for name in names if name not in table]
    if unknown:
        got = ", ".join(map(str, unknown))
        raise ValueError(f"{argument}: expected names of {', '.join(table)}; got {got}")
    if not names:
        raise ValueError(f"{argument}: expected at least one of {', '.join(table)}; got none")
    return names


def _possible(
    argument: str, names: Sequence[str] | None, table: tuple[str, ...], impossible: dict[str, str]
) -> tuple[str, ...]:
    """The choice without what is impossible; ValueError if an impossible name was asked for."""
    if names is None:
        return tuple(name for name in table if name not in impossible)
    chosen = _choice(argument, names, table)
    for name in chosen:
        if name in impossible:
            raise ValueError(f"{argument}: {name!r} is not possible in this world: {impossible[name]}")
    return chosen
