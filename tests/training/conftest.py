"""A run of the preset `tiny`, made once."""

from __future__ import annotations

import pytest

from dalle2_fast.cli import main


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with all four stages of `tiny` trained by the command line, and the pipeline."""
    out = tmp_path_factory.mktemp("run")
    assert main(["train", "all", "--preset", "tiny", "--out", str(out), "--device", "cpu", "--quiet"]) == 0
    return out
