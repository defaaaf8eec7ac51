"""Examples in the docstrings of adapters that need another package, and names that old pickles hold."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

SKIP = "  # doctest: +SKIP"  # pytest --doctest-modules runs without the other packages


@pytest.mark.parametrize("name", ["FusedUnCLIP", "FusedDDPM", "FusedDDIM"])
def test_examples_of_schedulers_run(name):
    """Catches: an example that does not run, or prints something else."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    schedulers = import_module("dalle2_fast.adapters.diffusers.schedulers")
    text = getattr(schedulers, name).__doc__.replace(SKIP, "")
    test = doctest.DocTestParser().get_doctest(text, dict(vars(schedulers)), name, None, None)
    assert len(test.examples) > 3
    assert doctest.DocTestRunner().run(test).failed == 0


OLD_NAMES = {
    "_swap": "Patched _rebuild",
    "norm_blocks": "FusedGroupNorm FusedSequential FusedResBlock FusedCheckpointedResBlock",
    "diffusers_blocks": "FusedResnetBlock2D FusedAttention CachingPipeline",
    "dalle2_pytorch_blocks": "FusedBlock FusedCrossAttention FusedSelfAttention",
    "diffusers_schedulers": "_Tables",
}


@pytest.mark.parametrize("module", OLD_NAMES)
def test_names_in_pickles_of_version_0_1_0_are_found(module):
    """Catches: a pickled patched model, or a scheduler that has sampled, that names a module which moved."""
    found = import_module(f"dalle2_fast.adapters.{module}")
    assert [name for name in OLD_NAMES[module].split() if not hasattr(found, name)] == []
