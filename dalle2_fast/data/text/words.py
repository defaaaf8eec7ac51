"""The words of a caption, and whether a tokenizer of words knows them.

It imports no torch, so that the command line refuses an unknown word at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")  # letters and digits, joined by - or '


def split_words(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation.

    Example:
        >>> split_words("The cat's blue-green hat.")
        ['the', "cat's", 'blue-green', 'hat']
    """
    return _WORD.findall(caption.lower())


def check_known(caption: str, words: Sequence[str], known: Collection[str], room: int) -> None:
    """Raise if a caption has no words or unknown ones.

    Args:
        caption: the caption.
        words: its words, as `split_words` gives them.
        known: the words that it may have.
        room: the most words of a caption, for the message.

    Raises:
        ValueError: the caption is empty, or has unknown words, which the message names with the nearest known
            ones.

    Example:
        >>> check_known("A star!", ["a", "star"], known=["a", "red", "star"], room=34)
    """
    if not words:
        raise ValueError(f"the caption {caption!r} is empty: expected 1 to {room} words")
    if strangers := list(dict.fromkeys(word for word in words if word not in known)):
        names = ", ".join(_with_nearest(word, known) for word in strangers)
        raise ValueError(
            f"unknown {'word' if len(strangers) == 1 else 'words'} {names} in the caption; "
            f"`dalle2-fast vocabulary` lists the {len(known)} known words"
        )


def check_length(words: int, room: int) -> None:
    """Raise ValueError if a caption has more than `room` words.

    Example:
        >>> check_length(3, 34)
    """
    if words > room:
        raise ValueError(f"the caption has {words} words: expected at most {room}")


def _with_nearest(stranger: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(stranger, list(known), n=3, cutoff=0.7)
    return f'"{stranger}"' + (f" (nearest: {', '.join(near)})" if near else "")
