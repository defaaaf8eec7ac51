"""Names of adapters that pickles of version 0.1.0 hold."""

from __future__ import annotations

from importlib import import_module

import pytest

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
