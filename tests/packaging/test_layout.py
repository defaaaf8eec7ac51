"""The shape of the source tree: files to be read at one sitting, folders to be taken in at a glance."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
CODE = (".py", ".cpp", ".h", ".cu", ".cuh", ".sh")


def sources() -> dict[Path, int]:
    """Source files that git tracks, or would track, and how many lines each has."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [ROOT / name for name in listed if name.endswith(CODE) and (ROOT / name).is_file()]
    return {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in paths}


def test_no_file_is_long():
    """Catches: a file that grew beyond one concept."""
    lines = sources()
    assert {str(path): count for path, count in lines.items() if count > 400} == {}
    assert median(lines.values()) <= 150


def test_no_folder_is_crowded():
    """Catches: a room with too many modules to be taken in at a glance."""
    folders = Counter(path.parent for path in sources())
    assert {str(folder): count for folder, count in folders.items() if count > 14} == {}


def test_no_room_without_a_concept():
    """Catches: files named after what they are not about."""
    vague = ("utils", "common", "misc", "helpers")
    assert [str(path) for path in sources() if path.stem in vague] == []
