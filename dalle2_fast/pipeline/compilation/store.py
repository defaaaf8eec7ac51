"""Compiled programs on disk: a folder for each, named by a digest of all that the program depends on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGE = Path(__file__).resolve().parents[2]


def default_folder() -> Path:
    """`dalle2_fast/compiled` in $XDG_CACHE_HOME, or in ~/.cache where that is not an absolute path.

    Source: the XDG Base Directory Specification.

    Example:
        >>> default_folder().name
        'compiled'
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return cache / "dalle2_fast" / "compiled"


def find_or_build(folder: Path, facts: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder of the program with these facts.

    Args:
        folder: of all programs; it is created for its user alone, because programs are code.
        facts: what the program depends on; JSON must be able to hold it. It is written next to the program.
        build: called with an empty folder, into which it writes the program, if there is none. The folder
            gets its name when it is complete, so that no other process reads a part of a program.

    Raises:
        OSError: the folder cannot be written.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> program = find_or_build(folder, {"backend": "none"}, lambda path: (path / "program").touch())
        >>> find_or_build(folder, {"backend": "none"}, build=None) == program
        True
    """
    text = json.dumps(facts, indent=1, sort_keys=True)
    found = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
    if found.is_dir():
        return found
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
    try:
        build(partial)
        (partial / "facts.json").write_text(text)
        os.replace(partial, found)
    except OSError:
        if not found.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


@functools.cache
def digest_of_sources() -> str:
    """Of this package's Python files: a change of a network never meets a program of the code before it."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()


def digest_of_weights(network: nn.Module) -> str:
    """Of all parameters and buffers, their names and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().flatten()
        digest.update(data.view(torch.uint8).numpy() if data.numel() else b"")
    return digest.hexdigest()


@functools.cache
def processor() -> str:
    """The instruction set of this machine's CPU: a program that was compiled for another may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:16]}"
