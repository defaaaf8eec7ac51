"""What has to be the same on every process: code, torch, and the command."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[2]


def facts_of(arguments: Mapping[str, Any], device: torch.device) -> dict[str, str]:
    """Code, library, command and kind of device of this process, for `Processes.agree`.

    Args:
        arguments: of the command by name.
        device: where this process trains.
    """
    options = {f"--{name.replace('_', '-')}": str(value) for name, value in arguments.items()}
    return {
        "code of dalle2_fast": fingerprint_of_code(),
        "version of torch": torch.__version__,
        "device": device.type,
        **options,
    }


def fingerprint_of_code() -> str:
    """A hash of the names and contents of all Python files of the package, as 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
