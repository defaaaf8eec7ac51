"""Change what an object computes by its class: `module.__class__` becomes a subclass of what it was.

The object stays the same one: its weights, hooks, names in the state_dict and everybody's references to it.
The subclass has the name and the module of the class it replaces, because trainers find blocks by class name
(Accelerate's device maps and FSDP policies) and pipelines write it down; `print` shows the difference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


class Patched:
    """The first base of every mixin. `plain`: the class that the object had, and gets back."""

    plain: type

    def _get_name(self) -> str:  # of nn.Module: what its repr begins with
        return f"{super()._get_name()}[dalle2_fast]"

    def __reduce_ex__(self, protocol: Any):
        """Copies and pickles are patched too; pickle would look the class up by its name and find theirs."""
        made_by, arguments, *state = super().__reduce_ex__(max(int(protocol), 2))
        here = type(self)
        if arguments[:1] != (here,) or "plain" not in vars(here):  # theirs to do, or wrapped once more
            return (made_by, arguments, *state)
        return (_rebuild, (mixin_of(here), here.plain), *state)


@functools.cache
def patched_class(mixin: type[Patched], plain: type) -> type:
    names = dict(__module__=plain.__module__, __qualname__=plain.__qualname__, __doc__=plain.__doc__)
    return type(plain.__name__, (mixin, plain), {**names, "plain": plain})


def _rebuild(mixin: type[Patched], plain: type) -> object:
    made = patched_class(mixin, plain)
    return made.__new__(made)


def mixin_of(patched: type) -> type[Patched]:
    return patched.__bases__[0]


def swap(target: object, mixin: type[Patched]) -> None:
    target.__class__ = patched_class(mixin, type(target))


def is_patched(target: object) -> bool:
    return "plain" in vars(type(target)) and isinstance(target, Patched)


def check_restorable(name: str, target: object) -> None:
    if isinstance(target, Patched) and not is_patched(target):
        raise RuntimeError(
            f"model: {name or 'it'} got another class, {type(target).__qualname__}, after it was patched (as "
            "fully_shard does); unpatch before that"
        )


def restore(target: object) -> bool:
    """Whether there was anything to restore."""
    if not is_patched(target):
        return False
    target.__class__ = type(target).plain
    return True


@dataclass(frozen=True)
class Cover:
    """One kind of module that `patch` knows.

    option: the argument of `patch` that it belongs to, "norms" or "attention".
    is_one: whether a module is of this kind.
    obstacle: why this one has to stay as it is, or None.
    """

    option: str
    mixin: type[Patched]
    is_one: Callable[[nn.Module], bool]
    obstacle: Callable[[nn.Module], str | None]


def overrides(module: nn.Module, base: type, method: str = "forward") -> str | None:
    """Why a subclass is not what its base is: it has another `method`. Classes made here do not count."""
    kind = type(module)
    while issubclass(kind, Patched) and "plain" in vars(kind):
        kind = kind.plain
    if getattr(kind, method) is getattr(base, method):
        return None
    return f"{kind.__qualname__} has a {method} of its own"
