"""What can be done to a JSON file: a config, an index of weights, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.hostile.damage import HUGE, Damage, content, void


def numbers(data: object, value: object) -> object:
    """Every whole number above 1 replaced."""
    if isinstance(data, dict):
        return {key: numbers(item, value) for key, item in data.items()}
    if isinstance(data, list):
        return [numbers(item, value) for item in data]
    return value if isinstance(data, int) and not isinstance(data, bool) and data > 1 else data


def edited(change: Callable[[dict], object]) -> Damage:
    return lambda path: void(path.write_text(json.dumps(change(json.loads(path.read_text())))))


def number_places(data: object, place: tuple = ()) -> list[tuple]:
    """Where the numbers of a JSON value lie, as keys and indices."""
    if isinstance(data, dict):
        return [found for key, item in data.items() for found in number_places(item, (*place, key))]
    if isinstance(data, list):
        pairs = enumerate(data[:2])  # the others of a list are read alike
        return [found for index, item in pairs for found in number_places(item, (*place, index))]
    return [place] if isinstance(data, int | float) and not isinstance(data, bool) else []


def with_number(data: object, place: tuple, value: object) -> object:
    """A copy of a JSON value with one number replaced."""
    if not place:
        return value
    copy = data.copy()
    copy[place[0]] = with_number(data[place[0]], place[1:], value)
    return copy


def named(index: dict, name: str) -> dict:
    """An index whose tensors all lie in the file of that name."""
    return {"weight_map": dict.fromkeys(index["weight_map"], name)}


def names_itself(path: Path) -> None:
    path.write_text(json.dumps(named(json.loads(path.read_text()), path.name)))


INDEX: dict[str, Damage] = {  # of weights in several files
    "names itself": names_itself,
    "names a file elsewhere": edited(lambda index: named(index, "../elsewhere.safetensors")),
    "names an absolute path": edited(lambda index: named(index, "/etc/passwd")),
    "names a folder": edited(lambda index: named(index, "..")),
    "names a missing file": edited(lambda index: named(index, "gone.safetensors")),
    "a map of numbers": edited(lambda index: {"weight_map": dict.fromkeys(index["weight_map"], 1)}),
    "a tensor more": edited(
        lambda index: {"weight_map": index["weight_map"] | {"x": next(iter(index["weight_map"].values()))}}
    ),
}

JSON: dict[str, Damage] = {
    "nested deeply": content(b'{"a":' * 100_000),
    "not utf-8": content(b'{"model": "\xff\xfe"}'),
    "a list": content(b"[]"),
    "a number": content(b"7"),
    "no keys": content(b"{}"),
    "all numbers 10^9": edited(lambda config: numbers(config, HUGE)),
    "all numbers negative": edited(lambda config: numbers(config, -3)),
    "all numbers words": edited(lambda config: numbers(config, "many")),
    "all numbers lists": edited(lambda config: numbers(config, [[]])),
    "all numbers 0": edited(lambda config: numbers(config, 0)),
    "all numbers fractions": edited(lambda config: numbers(config, 2.5)),
}
