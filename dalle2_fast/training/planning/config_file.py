"""The configuration of a run as a YAML file: a preset, or what differs from one.

    base: scenes-gpu            # the preset that has all other values; without it the file needs every stage
    name: more-steps
    decoder:
      optimisation: {batch_size: 256, learning_rate: 1e-3}

`dalle2-fast train --print-config` writes the whole of it, with the options of the command line. Nothing here
imports torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle2_fast.training.presets import PRESETS, get_preset
from dalle2_fast.training.recipes import EXTRA_STAGES, STAGES, Optimisation, Preset, Recipe

FILE = "preset.yaml"  # in the folder of a run whose preset is none of PRESETS
RECIPES = (*STAGES, "ar_prior", *EXTRA_STAGES)
SUFFIXES = (".yaml", ".yml")
_OPTIONAL = ("ar_prior", *EXTRA_STAGES)
# YAML 1.1, which PyYAML reads, takes 1e-3 for a string: it expects 1.0e-3.
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


def load_preset(name: str) -> Preset:
    """The preset called `name`, or the one that a YAML file describes.

    Args:
        name: one of PRESETS, or the path of a .yaml file.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: PyYAML is not installed.
        ValueError: an unknown preset, or a file with an unknown name or a value of the wrong kind.

    Example:
        >>> load_preset("tiny").decoder.optimisation.batch_size
        4
    """
    if not is_file(name):
        return get_preset(name)
    path = Path(name)
    try:
        content = _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"--preset: no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--preset: {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--preset: {path}: expected a mapping with base, name and stages, got {content!r}")
    return _preset(content, str(path), default_name=path.stem)


def is_file(name: str) -> bool:
    """Whether the name of a preset is the path of a file.

    Example:
        >>> is_file("tiny"), is_file("runs/mine.yaml")
        (False, True)
    """
    return Path(name).suffix in SUFFIXES


def change(preset: Preset, assignments: Sequence[str]) -> Preset:
    """The preset with some values replaced, as `--set` writes them.

    Args:
        preset: to change.
        assignments: each "dotted.name=value", the value in YAML.

    Raises:
        ImportError: PyYAML is not installed.
        ValueError: no assignment, or an unknown name or a value of the wrong kind.

    Example:
        >>> preset = change(load_preset("tiny"), ["decoder.optimisation.learning_rate=3e-4"])
        >>> preset.decoder.optimisation.learning_rate
        0.0003
    """
    for text in assignments:
        name, equals, value = text.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(f"--set: expected NAME=VALUE, as decoder.optimisation.steps=500, got {text!r}")
        changed: Any = _parse(value, f"--set {name}")
        for key in reversed(keys):
            changed = {key: changed}
        preset = _merge(preset, changed, f"--set {name}")
    return preset


def dump_preset(preset: Preset) -> str:
    """The preset as YAML, which `load_preset` reads back. ImportError if PyYAML is not installed.

    Example:
        >>> print(dump_preset(load_preset("tiny")).splitlines()[0])
        name: tiny
    """
    values = dataclasses.asdict(preset)
    absent = [name for name in _OPTIONAL if values[name] is None]
    for name in absent:
        del values[name]
    return _yaml().safe_dump(_plain(values), sort_keys=False, width=110)


def _preset(content: dict, where: str, default_name: str) -> Preset:
    """A preset from the content of a file."""
    base = content.pop("base", None)
    if base is not None:
        if base not in PRESETS:
            raise ValueError(f"{where}: base: expected one of {', '.join(PRESETS)}, got {base!r}")
        return _merge(get_preset(base), {"name": default_name} | content, where)
    missing = [name for name in STAGES if name not in content]
    if missing:
        raise ValueError(f"{where}: expected base, a preset, or all stages; it has no {', '.join(missing)}")
    empty = Recipe({}, Optimisation(batch_size=1, steps=1))
    recipes = {name: None if name in _OPTIONAL else empty for name in RECIPES}
    for name in STAGES:
        options = content[name].get("optimisation") if isinstance(content[name], dict) else None
        if not isinstance(options, dict) or "batch_size" not in options:
            raise ValueError(f"{where}: {name}: expected optimisation with batch_size and steps or minutes")
        if "steps" not in options:  # that of `empty` is no default
            content[name] = content[name] | {"optimisation": options | {"steps": None}}
    return _merge(Preset(name=default_name, world={}, **recipes), content, where)


def _merge(preset: Preset, changes: Mapping[str, Any], where: str) -> Preset:
    """The preset with nested changes; dictionaries are merged, all other values replaced."""
    changed: dict[str, Any] = {}
    known = [each.name for each in dataclasses.fields(Preset)]
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{where}: expected some of {', '.join(known)}, got {name!r}")
        if name in RECIPES:
            changed[name] = _merge_recipe(getattr(preset, name), value, f"{where}: {name}")
        elif name in ("world", "sampling"):
            changed[name] = _merge_dict(getattr(preset, name), value, f"{where}: {name}")
        else:
            kind = bool if name == "scenes" else str
            if not isinstance(value, kind):
                raise ValueError(f"{where}: {name}: expected a {kind.__name__}, got {value!r}")
            changed[name] = value
    return dataclasses.replace(preset, **changed)


def _merge_recipe(recipe: Recipe | None, changes: Any, where: str) -> Recipe | None:
    if changes is None:
        return None
    if not isinstance(changes, dict):
        raise ValueError(f"{where}: expected a mapping, got {changes!r}")
    if recipe is None:
        recipe = Recipe({}, Optimisation(batch_size=1, steps=1))
    known = [each.name for each in dataclasses.fields(Recipe)]
    if unknown := [name for name in changes if name not in known]:
        raise ValueError(f"{where}: expected some of {', '.join(known)}, got {unknown[0]!r}")
    optimisation = recipe.optimisation
    if (given := changes.get("optimisation")) is not None:
        optimisation = _merge_optimisation(optimisation, given, f"{where}: optimisation")
    return Recipe(
        _merge_dict(recipe.model, changes.get("model", {}), f"{where}: model"),
        optimisation,
        _merge_dict(recipe.data, changes.get("data", {}), f"{where}: data"),
    )


def _merge_optimisation(options: Optimisation, changes: Any, where: str) -> Optimisation:
    if not isinstance(changes, dict):
        raise ValueError(f"{where}: expected a mapping, got {changes!r}")
    kinds = {each.name: str(each.type) for each in dataclasses.fields(Optimisation)}
    values = dict(changes)
    for name, value in changes.items():
        if name not in kinds:
            raise ValueError(f"{where}: expected some of {', '.join(kinds)}, got {name!r}")
        values[name] = _checked(value, kinds[name], f"{where}: {name}")
    if values.get("minutes") is not None and "steps" not in values:
        values["steps"] = None  # a length in minutes takes the place of one in steps
    try:
        return dataclasses.replace(options, **values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _checked(value: Any, kind: str, where: str) -> Any:
    """The value as a field of this type (of Optimisation) has it. ValueError if it is of another kind."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None and "None" in kind:
        return None
    if kind.startswith("tuple"):
        pair = isinstance(value, (list, tuple)) and len(value) == 2
        if pair and all(isinstance(each, (int, float)) for each in value):
            return tuple(float(each) for each in value)
        raise ValueError(f"{where}: expected two numbers, got {value!r}")
    if kind.startswith("int"):
        if isinstance(value, int) and is_number:
            return value
        raise ValueError(f"{where}: expected an int, got {value!r}")
    if kind.startswith("float"):
        if is_number:
            return float(value)
        raise ValueError(f"{where}: expected a number, got {value!r}")
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a string, got {value!r}")
    return value


def _merge_dict(before: Mapping[str, Any], changes: Any, where: str) -> dict[str, Any]:
    if not isinstance(changes, dict):
        raise ValueError(f"{where}: expected a mapping, got {changes!r}")
    merged = dict(before)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge_dict(merged[name], value, f"{where}: {name}") if nested else value
    return merged


def _parse(text: str, where: str) -> Any:
    yaml = _yaml()

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: no YAML: {' '.join(str(error).split())}") from None


def _yaml():
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "a configuration in YAML needs PyYAML, which is not installed: pip install 'dalle2-fast[train]'"
        ) from error
    return yaml


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
