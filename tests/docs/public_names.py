"""Every public name: those that test_public_paths.py lists, and those of every `__all__` in the package."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from tests.packaging.test_public_paths import PUBLIC

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
    for path in sorted((ROOT / "dalle2_fast").rglob("*.py"))
}
# The server and the demo are programs: their interface is the command line.
NOT_PUBLIC = re.compile(r"\.(_\w+|serving|demo|previous_paths)(\.|$)")
# Their classes are subclasses of another package's classes, which may not be installed.
ADAPTED = ("dalle2_fast.adapters.diffusers", "dalle2_fast.adapters.dalle2_pytorch")


def exported() -> dict[str, set[str]]:
    """module -> its public names"""
    names = {module: set(listed.split()) for module, listed in PUBLIC.items()}
    for module, text in SOURCES.items():
        if re.search(r"^(\w.*)?__all__.* = ", text, re.MULTILINE) and not NOT_PUBLIC.search(module):
            names.setdefault(module, set()).update(import_module(module).__all__)
    return names


EXPORTED = exported()


def find(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def callables() -> list[str]:
    """The public functions and classes, each once, under the shortest of its names."""
    names = [f"{module}.{name}" for module in EXPORTED if module not in ADAPTED for name in EXPORTED[module]]
    first: dict[int, str] = {}
    for name in sorted(names, key=lambda name: (name.count("."), name)):
        if callable(find(name)) and name != "dalle2_fast.data.Tokenizer":  # a union of two classes
            first.setdefault(id(find(name)), name)
    return sorted(first.values())


CALLABLES = callables()


def members(owner: type) -> dict[str, Callable]:
    """The public methods and properties of a class that are ours, inherited ones included."""
    found = {}
    for name in dir(owner):
        value = inspect.getattr_static(owner, name)
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not inspect.isfunction(value) or not value.__module__.startswith("dalle2_fast"):
            continue
        if not name.startswith("_") or name in ("__init__", "__call__"):
            found[name] = inspect.unwrap(value)
    return found


MEMBERS = {
    f"{name}.{member}": function
    for name in CALLABLES
    if inspect.isclass(find(name))
    for member, function in members(find(name)).items()
}
