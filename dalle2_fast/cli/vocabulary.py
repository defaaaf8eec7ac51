"""`dalle2-fast vocabulary`: the words that a checkpoint knows, grouped, and captions made of them."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dalle2_fast.cli.arguments import add_checkpoint, add_json

if TYPE_CHECKING:
    from dalle2_fast.data import Tokenizer

EXAMPLES = """\
  dalle2-fast vocabulary
  dalle2-fast vocabulary --json | jq -r '.words[]'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast vocabulary`."""
    add_checkpoint(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the words; the exit code."""
    from dalle2_fast.checkpoints import construct, embedded_path, load_config
    from dalle2_fast.data import BPETokenizer, tokenizer_from_config
    from dalle2_fast.data.synthetic.grammar import EXAMPLES, LIMITS, word_groups

    path = args.checkpoint or embedded_path()
    tokenizer = construct(tokenizer_from_config, load_config(path), "tokenizer", path)
    limit = tokenizer.context_length - 2  # without the begin and the end token
    if args.json:
        print(json.dumps(_facts(tokenizer, limit)))
        return 0
    if isinstance(tokenizer, BPETokenizer):
        print(
            f"Any text: it is read as byte pairs of {tokenizer.vocab_size:,} kinds; a caption holds at most "
            f"{limit}."
        )
        return 0
    print(f"{len(tokenizer.words)} words; a caption holds at most {limit}.")
    if not tokenizer.of_scenes:
        _print_words("", sorted(tokenizer.words))
        return 0
    for heading, words in word_groups(tokenizer.words).items():
        _print_words(f"{heading}: ", words)
    known = set(tokenizer.words)
    examples = [sentence for sentence in EXAMPLES if known.issuperset(sentence.split())]
    if examples:
        print("For example:")
        for sentence in examples:
            print(f"  {sentence}")
    print("Captions keep to these rules, and are refused otherwise:")
    for sentence in LIMITS:
        print(textwrap.fill(f"- {sentence}", width=_width(), initial_indent="  ", subsequent_indent="    "))
    return 0


def _facts(tokenizer: Tokenizer, limit: int) -> dict[str, object]:
    """The words as one JSON object; `words` is None where any text is read."""
    from dalle2_fast.data.synthetic.grammar import word_groups

    words = getattr(tokenizer, "words", None)
    of_scenes = getattr(tokenizer, "of_scenes", False)
    groups = {name: list(group) for name, group in word_groups(words).items()} if of_scenes else {}
    return {
        "kind": "byte pairs" if words is None else "words",
        "limit": limit,
        "words": None if words is None else sorted(words),
        "groups": groups,
    }


def _width() -> int:
    return min(100, shutil.get_terminal_size().columns)


def _print_words(heading: str, words: Sequence[str]) -> None:
    text = heading + " ".join(words)
    indent = "  " if heading else ""
    print(textwrap.fill(text, width=_width(), subsequent_indent=indent, break_on_hyphens=False))
