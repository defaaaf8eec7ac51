"""What can be refused from the checkpoint's config.json alone: unknown words, sizes, settings out of range.

It imports no torch, so that such an error comes at once and not after the weights are read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dalle2_fast
from dalle2_fast.data.text.words import check_known, check_length, split_words
from dalle2_fast.pipeline.parts import UPSAMPLERS
from dalle2_fast.pipeline.settings import SamplingSettings

# As checkpoints.embedded_path(), whose module imports torch.
EMBEDDED = Path(dalle2_fast.__file__).resolve().parent / "pretrained" / "scenes"
# The arguments of all commands that hold captions -> what an error message calls each.
CAPTIONS = {
    "captions": "caption", "caption": "caption", "source": "--from", "target": "--to",
    "negative_prompt": "--negative",
}  # fmt: skip


def read_config(checkpoint: Path | None) -> dict[str, Any] | None:
    """The config.json of a checkpoint folder of dalle2_fast.

    Args:
        checkpoint: the folder; None is the one in the package.

    Returns:
        The config, unchecked; None for every other layout and for a file that cannot be read, about which
        loading will say more.

    Example:
        >>> read_config(None)["model"]
        'DALLE2'
    """
    try:
        text = ((EMBEDDED if checkpoint is None else checkpoint) / "config.json").read_text("utf-8")
        config = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) and config.get("model") == "DALLE2" else None


def image_sizes(config: Mapping[str, Any]) -> list[int]:
    """The sides of the images that a checkpoint makes, smallest first; none if its config does not say.

    Example:
        >>> image_sizes({"decoder": {"image_size": 64}, "upsampler": {"image_size": 256}})
        [64, 256]
    """
    parts = [config.get(name) for name in ("decoder", *UPSAMPLERS)]
    sizes = [part.get("image_size") for part in parts if isinstance(part, dict)]
    return sizes if all(isinstance(size, int) for size in sizes) else []


def check_request(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Refuse what the checkpoint cannot do, as far as its config.json tells.

    Args:
        args: the command line.
        given: the size and the SamplingSettings in it; None is the checkpoint's.

    Raises:
        ValueError, TypeError: a caption is empty, too long or has an unknown word; the checkpoint makes no
            images of the size; or a setting is out of range.
    """
    SamplingSettings(**{k: v for k, v in given.items() if v is not None and k != "size"})
    captions = _captions(args)
    for label, caption in captions:
        if not caption.strip():
            raise ValueError(f"{label}: expected words, got an empty caption")
    if (config := read_config(args.checkpoint)) is None:
        return
    sizes, size = image_sizes(config), given.get("size")
    if size is not None and sizes and size not in sizes:
        raise ValueError(f"--size: expected one of {', '.join(map(str, sizes))}, got {size}")
    for label, caption in captions:
        try:
            check_caption(config, caption)
        except ValueError as error:
            raise error if label == "caption" else ValueError(f"{label}: {error}") from None


def check_caption(config: Mapping[str, Any], caption: str) -> None:
    """Raise ValueError if a tokenizer of words, as the config has it, does not read a caption.

    Example:
        >>> check_caption({"tokenizer": {"table": ["a", "star"], "context_length": 8}}, "A star!")
    """
    tokenizer = config.get("tokenizer")
    if not isinstance(tokenizer, dict) or tokenizer.get("kind", "words") != "words":
        return  # byte pairs read any text
    table, length = tokenizer.get("table"), tokenizer.get("context_length")
    if not isinstance(table, list) or not isinstance(length, int):
        return
    words, room = split_words(caption), length - 2
    known = tokenizer.get("known") or table
    check_known(caption, words, known, room)
    if _of_scenes(table):
        from dalle2_fast.data.synthetic.meaning import check_meaning

        check_meaning(words)
    check_length(len(words), room)


def _of_scenes(table: list[str]) -> bool:
    from dalle2_fast.data.synthetic.vocabulary import SPECIALS, WORDS

    return tuple(table) == WORDS[len(SPECIALS) :]


def _captions(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(what to call it, caption) of every caption on the command line."""
    found = []
    for name, label in CAPTIONS.items():
        value = getattr(args, name, None)
        if isinstance(value, list) and len(value) > 1:
            found += [(f"caption {number}", caption) for number, caption in enumerate(value, start=1)]
        elif value is not None:
            found += [(label, caption) for caption in (value if isinstance(value, list) else [value])]
    return found
