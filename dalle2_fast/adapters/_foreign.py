"""Classes of packages that may not be installed: found without an import, or subclassed on first use."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


def imported_class(module: str, name: str) -> type | None:
    """A class of another package, None if that module has not been imported. A user who has an object of the
    class has imported it."""
    found = sys.modules.get(module)
    return None if found is None else getattr(found, name)


def is_instance(module: str, name: str) -> Callable[[object], bool]:
    """A function that says whether an object is an instance of this class of another package."""

    def check(candidate: object) -> bool:
        kind = imported_class(module, name)
        return kind is not None and isinstance(candidate, kind)

    return check


@contextlib.contextmanager
def needed_package(package: str, adapter: str) -> Iterator[None]:
    """Within the block, an ImportError names the adapter and the package that it needs."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{adapter} needs the package {package} (pip install {package}), which cannot be imported: "
            f"{error}"
        ) from error


def subclass(module: str, name: str, mixin: type, base: type) -> type:
    """The class (mixin, base), which pickle finds as `module.name` through the module's `__getattr__`."""
    return type(name, (mixin, base), dict(__module__=module, __qualname__=name, __doc__=mixin.__doc__))


def attach_classes(
    module: str, names: tuple[str, ...], make: Callable[[], dict[str, type]]
) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a module whose classes `make` creates when one is first named."""

    def __getattr__(name: str) -> type:
        if name in names:
            return make()[name]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[module]), *names})

    return __getattr__, __dir__
