"""The record of what all files of a folder have in common, so that only the same command goes on with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def agree_on_record(path: Path, settings: dict[str, Any], option: str) -> None:
    """Write a record, or compare the settings with the one that is there.

    The first of several processes writes it, and the others compare theirs with it.

    Args:
        path: of the record; its folder is made if it does not exist.
        settings: JSON-able.
        option: the option that names the folder, for messages.

    Raises:
        ValueError: the record has other settings, or is damaged.
        OSError: it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "record.json")
        >>> agree_on_record(path, {"seed": 1}, "--output")
        >>> agree_on_record(path, {"seed": 1}, "--output")
    """
    from dalle2_fast.checkpoints.atomic import SUFFIX  # here, because it imports torch

    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
        try:
            temporary.write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
            os.link(temporary, path)  # a rename would replace the record of another process
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(recorded, dict):
            raise ValueError("expected an object")
    except ValueError as error:
        raise ValueError(f"{option}: {path}: damaged record ({error})") from None
    expected = json.loads(json.dumps(settings))
    differing = [
        f"{name}: the folder has {_shown(recorded.get(name))}, got {_shown(expected.get(name))}"
        for name in dict.fromkeys((*recorded, *expected))
        if recorded.get(name) != expected.get(name)
    ]
    if differing:
        raise ValueError(
            f"{option}: {path.parent} holds the results of another command ({'; '.join(differing)}): choose "
            "another folder"
        )


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"{len(value)} entries"
    return str(value)
