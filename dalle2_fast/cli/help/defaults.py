"""The defaults of a checkpoint in the `--help` of a command, read from its config.json without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle2_fast.cli.checks.request import image_sizes, read_config
from dalle2_fast.pipeline.settings import SamplingSettings


def show_defaults(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add to the help of each setting the value that the checkpoint has for it.

    Args:
        parser: of the command, with its options.
        words: what follows the command; --checkpoint among them names the checkpoint.
    """
    if not any(action.dest == "checkpoint" for action in parser._actions):
        return
    defaults = _defaults(_checkpoint(words))
    for action in parser._actions:
        if action.dest in defaults and action.default is None and action.help:
            value = defaults[action.dest]
            if value is not None and "(default" not in action.help:
                action.help += f" (default {_text(value)})"


def _checkpoint(words: Sequence[str]) -> Path | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--checkpoint":
            return Path(value if equals else following)
    return None


def _defaults(checkpoint: Path | None) -> dict[str, Any]:
    if (config := read_config(checkpoint)) is None:
        return {}
    try:
        settings = SamplingSettings.from_dict(config.get("sampling") or {}).to_dict()
    except (TypeError, ValueError):  # loading will say what is wrong
        settings = {}
    if not config.get("upsampler2"):  # nothing of it runs
        settings = {name: value for name, value in settings.items() if not name.startswith("upsampler2")}
    sizes = image_sizes(config)
    return settings | ({"size": sizes[-1]} if sizes else {})


def _text(value: Any) -> str:
    return " ".join(f"{bound:g}" for bound in value) if isinstance(value, tuple) else str(value)
