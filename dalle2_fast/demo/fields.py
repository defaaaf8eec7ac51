"""Errors that belong to a field of the page, and the checks of what people type there."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import Any

MAX_LETTERS = 2000  # of a caption; every tokenizer refuses long ones, but it reads them first
MAX_MESSAGE = 500  # letters of an error, for a caption may have hundreds of unknown words
MAX_SEED = 2**63 - 1


class FieldError(ValueError):
    """What is wrong with one field; the message says it as the command line does.

    Args:
        field: the name of the field.
        message: what is wrong.

    Example:
        >>> str(FieldError("seed", "expected a whole number, got 1.5"))
        'expected a whole number, got 1.5'
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def sentence(message: str) -> str:
    """An error message as a sentence: with a capital, a full stop, and an end.

    Example:
        >>> sentence("expected at least 1, got 0")
        'Expected at least 1, got 0.'
    """
    text = " ".join(message.split())
    if len(text) > MAX_MESSAGE:
        text = f"{text[:MAX_MESSAGE]} ..."
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def attribute(error: Exception, fields: Collection[str], default: str) -> FieldError:
    """An error of the pipeline, whose message begins with the name of an argument, as that field's error.

    Args:
        error: of the pipeline.
        fields: the names of the fields that the page has.
        default: the field of every other error.

    Example:
        >>> attribute(ValueError("steps: expected at least 1, got 0"), ["steps"], "run").field
        'steps'
    """
    name, colon, rest = str(error).partition(": ")
    if colon and name in fields:
        return FieldError(name, rest)
    return FieldError(default, str(error) or type(error).__name__)


def whole_number(field: str, value: Any, low: int, high: int) -> int:
    """`value` as an int; FieldError unless it is a whole number from low to high.

    Example:
        >>> whole_number("number", 4.0, 1, 16)
        4
    """
    expected = f"expected a whole number from {low} to {high}"
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldError(field, f"{expected}, got {'none' if value is None else repr(value)}")
    if not math.isfinite(value) or value != int(value) or not low <= value <= high:
        raise FieldError(field, f"{expected}, got {value:g}")
    return int(value)


def seed_of(field: str, text: str | int | None, count: int) -> int:
    """The seed that was typed, or a random one for an empty field.

    Args:
        field: the name of the field.
        text: what was typed. It is no number on the page, because browsers hold large ones inexactly.
        count: of the seeds from this one on, which all have to be in range.

    Raises:
        FieldError: not a whole number in range.

    Example:
        >>> seed_of("seed", " 7 ", 4)
        7
    """
    word = "" if text is None else str(text).strip()
    if not word:
        return int.from_bytes(os.urandom(4), "big")
    if not (word.isascii() and word.isdigit()) or len(word) > 19 or int(word) > MAX_SEED - count + 1:
        expected = f"expected a whole number from 0 to {MAX_SEED - count + 1}, or nothing for a random one"
        raise FieldError(field, f"{expected}, got {word[:40]!r}")
    return int(word)


def number(field: str, value: Any, low: float, high: float) -> float:
    """`value` as a float; FieldError unless it is a number from low to high.

    Example:
        >>> number("guidance", 3, 0, 20)
        3.0
    """
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldError(field, f"expected a number, got {'none' if value is None else repr(value)}")
    if not low <= value <= high:
        raise FieldError(field, f"expected a number from {low:g} to {high:g}, got {value:g}")
    return float(value)


def whole_numbers(field: str, text: str, low: int, high: int) -> list[int]:
    """The whole numbers in a text, between commas or blanks; FieldError for anything else.

    Example:
        >>> whole_numbers("dims", "1, 4 16", 0, 192)
        [1, 4, 16]
    """
    words = str(text or "").replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() and len(word) < 7 for word in words):
        raise FieldError(field, f"expected whole numbers with commas between them, got {str(text)[:40]!r}")
    return [whole_number(field, int(word), low, high) for word in words]
