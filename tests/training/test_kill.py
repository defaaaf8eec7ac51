"""A training that is killed anywhere is resumed bit for bit; see kill.py, which tries more instants."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("options", ["--kills 3 --stages clip upsampler", "--kills 3 --stages clip --shards"])
def test_no_kill_full_disk_or_read_only_folder_loses_a_run(options):
    """Catches: a state that is replaced before the new one is whole, a lock or a temporary file that outlives
    its process, data or settings that a killed run forgets, a log that repeats lines."""
    if "--shards" in options and importlib.util.find_spec("webdataset") is None:
        pytest.skip("needs webdataset")
    result = subprocess.run(
        [sys.executable, "-m", "tests.training.kill", *options.split()], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
