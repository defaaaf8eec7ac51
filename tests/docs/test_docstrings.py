"""The examples in docstrings run, and every public name has a docstring that says what its user must know."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
from importlib import import_module
from pathlib import Path

import pytest

from tests.packaging.test_public_paths import PUBLIC

ROOT = Path(__file__).resolve().parents[2]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "dalle2_fast").rglob("*.py")
    if "\n        >>> " in (text := path.read_text()) or "\n    >>> " in text
)
OPTIONAL = {
    "dalle2_fast.adapters.diffusers": "diffusers",
    "dalle2_fast.adapters.dalle2_pytorch": "dalle2_pytorch",
    "dalle2_fast.data.sources": "webdataset",
    "dalle2_fast.serving.fields": "pydantic",
}
# The references are the formulas of the functions in dalle2_fast.functional, which have the arguments.
FORMULAS = [f"dalle2_fast.reference.{name}" for name in PUBLIC["dalle2_fast.reference"].split()]
CALLABLES = sorted(
    {
        id(thing): f"{module}.{name}"  # a name that two modules share is checked once
        for module in reversed(PUBLIC)
        if module != "dalle2_fast.reference"
        for name in PUBLIC[module].split()
        if callable(thing := getattr(import_module(module), name)) and name != "Tokenizer"  # a union
    }.values()
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    """Catches: an example that a reader copies and that fails or prints something else."""
    needed = next((package for prefix, package in OPTIONAL.items() if name.startswith(prefix)), None)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    module = import_module(name)
    failed, tried = doctest.testmod(module, verbose=False)
    assert tried and not failed


@pytest.mark.parametrize("name", CALLABLES)
def test_public_docstrings_are_complete(name):
    """Catches: a public function or class without its arguments, its result or an example."""
    module, _, attribute = name.rpartition(".")
    thing = getattr(import_module(module), attribute)
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
    module, _, attribute = name.rpartition(".")
    first = (inspect.getdoc(getattr(import_module(module), attribute)) or "").partition("\n\n")[0]
    assert any(sign in first for sign in "=()") or first.endswith(".")
