"""Samples of WebDataset: the files of one name, and the caption among them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("txt", "caption", "json")  # in a JSON file, the caption is "caption" or "text"
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # the key and the ending, as in webdataset
_META = re.compile(r"__[^/]*__($|/)")  # files about the shard


def group(files: Iterable[tuple[str, bytes]]) -> Iterator[dict[str, Any]]:
    """Neighbouring files whose names differ only in the ending make one sample.

    Args:
        files: (name, content), in the order of the archive.

    Yields:
        ending -> content, and the common part of the names as "__key__".

    Example:
        >>> [sorted(sample) for sample in group([("1.png", b""), ("1.TXT", b""), ("2.png", b"")])]
        [['__key__', 'png', 'txt'], ['__key__', 'png']]
    """
    sample: dict[str, Any] = {}
    for name, content in files:
        if _META.match(name) or (found := _NAME.fullmatch(name)) is None:
            continue
        key, ending = found[1], found[2].lower()
        if key != sample.get("__key__"):
            if sample:
                yield sample
            sample = {"__key__": key}
        sample.setdefault(ending, content)  # the first of two files with the same name
    if sample:
        yield sample


def caption_of(sample: dict[str, Any]) -> str | None:
    """The caption of a sample: "" if there is none, None if it is something else than text.

    In a JSON file it is "caption" or "text"; of a list of captions, the first one is taken.

    Args:
        sample: as `group` makes it.

    Example:
        >>> caption_of({"json": b'{"caption": ["a red star", "a star"]}'})
        'a red star'
    """
    for key in CAPTION_KEYS:
        if key not in sample:
            continue
        text = sample[key].decode("utf-8", errors="replace")
        if key == "json":
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):  # of Unicode, of numbers, of lists nested a thousand deep
                return ""
            text = (record.get("caption") or record.get("text") or "") if isinstance(record, dict) else record
        return text_of(text)
    return ""


def text_of(value: object) -> str | None:
    """A caption as text: the first one that is not blank of a list; None for what is no text.

    Example:
        >>> text_of([" ", "a star "])
        'a star'
    """
    if isinstance(value, list):
        value = next((entry for entry in value if isinstance(entry, str) and entry.strip()), None)
    return value.strip() if isinstance(value, str) else None
