"""Names of a package that are imported on first use (PEP 562), so that the package itself imports at once."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from sys import modules


def attach(package: str, names: Mapping[str, Sequence[str]]) -> tuple[Callable, Callable, list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of `package`; names: module -> the public names it defines."""
    homes = {name: module for module, defined in names.items() for name in defined}

    def __getattr__(name: str):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(modules[package], name, value)  # the next look-up does not come here
        return value

    def __dir__() -> list[str]:
        return sorted(set(vars(modules[package])) | set(homes))

    return __getattr__, __dir__, sorted(homes)
