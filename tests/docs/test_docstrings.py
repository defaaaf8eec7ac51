"""The examples in docstrings run, and every public name has a docstring that says what its user must know."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
from importlib import import_module

import pytest

from tests.docs.public_names import CALLABLES, MEMBERS, SOURCES, find
from tests.packaging.test_public_paths import PUBLIC

WITH_EXAMPLES = [name for name, text in SOURCES.items() if "\n        >>> " in text or "\n    >>> " in text]
OPTIONAL = {
    "dalle2_fast.adapters.diffusers": "diffusers",
    "dalle2_fast.adapters.dalle2_pytorch": "dalle2_pytorch",
    "dalle2_fast.data.sources": "webdataset",
    "dalle2_fast.serving.fields": "pydantic",
}
# The references are the formulas of the functions in dalle2_fast.functional, which have the arguments.
FORMULAS = [f"dalle2_fast.reference.{name}" for name in PUBLIC["dalle2_fast.reference"].split()]
WITH_ARGUMENTS = [name for name in CALLABLES if name not in FORMULAS]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    """Catches: an example that a reader copies and that fails or prints something else."""
    needed = next((package for prefix, package in OPTIONAL.items() if name.startswith(prefix)), None)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    module = import_module(name)
    failed, tried = doctest.testmod(module, verbose=False)
    assert tried and not failed


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_public_docstrings_are_complete(name):
    """Catches: a public function or class without its arguments, its result or an example."""
    thing = find(name)
    text = inspect.getdoc(thing) or ""
    assert text.partition("\n")[0].endswith((".", ":", "]")), "the first line is not a sentence or a formula"
    plain_error = inspect.isclass(thing) and issubclass(thing, Exception)
    parameters = [] if plain_error else [*inspect.signature(thing).parameters]
    if parameters:
        assert "Args:" in text, "no Args"
        missing = [key for key in parameters if f"{key}:" not in text and f"{key}," not in text]
        assert not missing, f"not described: {', '.join(missing)}"
    if inspect.isfunction(thing) and inspect.signature(thing).return_annotation not in (None, "None"):
        assert "Returns:" in text, "no Returns"
    assert ">>> " in text, "no example"


@pytest.mark.parametrize("name", FORMULAS)
def test_references_begin_with_their_formula(name):
    """Catches: a public reference that does not say what it computes."""
    first = (inspect.getdoc(find(name)) or "").partition("\n\n")[0]
    assert any(sign in first for sign in "=()") or first.endswith(".")


def test_public_methods_have_docstrings():
    """Catches: a method or a property without a word. One that overrides another has that one's docstring."""
    silent = []
    for name, function in MEMBERS.items():
        owner, _, member = name.rpartition(".")
        if member != "__init__" and not (function.__doc__ or inspect.getdoc(getattr(find(owner), member))):
            silent.append(name)
    assert not silent and len(MEMBERS) > 100


def test_public_signatures_have_types():
    """Catches: an argument or a result that an editor and a type checker show as Any."""
    functions = {name: inspect.unwrap(find(name)) for name in CALLABLES if inspect.isfunction(find(name))}
    bare = []
    for name, function in (functions | MEMBERS).items():
        signature = inspect.signature(function)
        parameters = [*signature.parameters.values()]
        if name in MEMBERS and not isinstance(inspect.getattr_static(*owner_of(name)), staticmethod):
            parameters = parameters[1:]  # self
        bare += [f"{name}({value.name})" for value in parameters if value.annotation is value.empty]
        if signature.return_annotation is signature.empty and not name.endswith(".__init__"):
            bare.append(f"{name} ->")
    assert not bare


def owner_of(name: str) -> tuple[object, str]:
    owner, _, member = name.rpartition(".")
    return find(owner), member
