"""Change what an object computes by its class: `module.__class__` becomes a subclass of the class it had.

The object stays the same one, with its weights, hooks, state_dict keys and all references to it. The subclass
has the name and the module of the class it replaces, because trainers find blocks by class name (Accelerate's
device maps and FSDP policies) and pipelines save it. `repr` shows the difference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


class Patched:
    """The first base class of every mixin. original_class: the class that the object had, and that `restore`
    gives back."""

    original_class: type

    def _get_name(self) -> str:  # nn.Module begins its repr with this name
        return f"{super()._get_name()}[dalle2_fast]"

    def __reduce_ex__(self, protocol: Any):
        """Copies and pickles stay patched. By its name, pickle would find the original class instead."""
        function, arguments, *state = super().__reduce_ex__(max(int(protocol), 2))
        kind = type(self)
        if arguments[:1] != (kind,) or "original_class" not in vars(kind):
            return (function, arguments, *state)  # the original class pickles itself, or wraps this one again
        return (_rebuild, (mixin_of(kind), kind.original_class), *state)


@functools.cache
def patched_class(mixin: type[Patched], original: type) -> type:
    """The subclass (mixin, original) with the name and module of `original`; one for all objects."""
    names = dict(__module__=original.__module__, __qualname__=original.__qualname__, __doc__=original.__doc__)
    return type(original.__name__, (mixin, original), {**names, "original_class": original})


def _rebuild(mixin: type[Patched], original: type) -> object:
    kind = patched_class(mixin, original)
    return kind.__new__(kind)


def mixin_of(patched: type) -> type[Patched]:
    return patched.__bases__[0]


def swap(target: object, mixin: type[Patched]) -> None:
    target.__class__ = patched_class(mixin, type(target))


def is_patched(target: object) -> bool:
    return "original_class" in vars(type(target)) and isinstance(target, Patched)


def check_restorable(name: str, target: object) -> None:
    """Raise RuntimeError if the class of a patched object was changed again."""
    if isinstance(target, Patched) and not is_patched(target):
        raise RuntimeError(
            f"model: {name or 'it'} got another class, {type(target).__qualname__}, after it was patched (as "
            "fully_shard does); unpatch before that"
        )


def restore(target: object) -> bool:
    """Give the object its original class back; False if it was not patched."""
    if not is_patched(target):
        return False
    target.__class__ = type(target).original_class
    return True


@dataclass(frozen=True)
class PatchRule:
    """How `patch` treats one kind of module.

    option: the argument of `patch` that switches it, "norms" or "attention".
    mixin: the first base of the class that a module of this kind gets.
    matches: whether a module is of this kind.
    why_unavailable: why a module of this kind has to keep its class, or None.
    """

    option: str
    mixin: type[Patched]
    matches: Callable[[nn.Module], bool]
    why_unavailable: Callable[[nn.Module], str | None]


def why_overridden(module: nn.Module, base: type, method: str = "forward") -> str | None:
    """Why a subclass may compute something else than its base: it overrides `method`. Classes made by
    `patched_class` do not count."""
    kind = type(module)
    while issubclass(kind, Patched) and "original_class" in vars(kind):
        kind = kind.original_class
    if getattr(kind, method) is getattr(base, method):
        return None
    return f"{kind.__qualname__} overrides {method}"
