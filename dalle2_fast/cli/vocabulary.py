"""`dalle2-fast vocabulary`: the words that a checkpoint knows."""

from __future__ import annotations

import argparse
import shutil
import textwrap

from dalle2_fast.cli.arguments import add_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast vocabulary`."""
    add_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Print the words; the exit code."""
    from dalle2_fast.checkpoints import construct, embedded_path, load_config
    from dalle2_fast.data import BPETokenizer, tokenizer_from_config

    path = args.checkpoint or embedded_path()
    tokenizer = construct(tokenizer_from_config, load_config(path), "tokenizer", path)
    limit = tokenizer.context_length - 2  # without the begin and the end token
    if isinstance(tokenizer, BPETokenizer):
        print(
            f"Any text: it is read as byte pairs of {tokenizer.vocab_size:,} kinds; a caption holds at most "
            f"{limit}."
        )
        return 0
    words = sorted(tokenizer.words)
    print(f"{len(words)} words; a caption holds at most {limit}.")
    width = min(100, shutil.get_terminal_size().columns)
    print(textwrap.fill(" ".join(words), width=width, break_on_hyphens=False))
    return 0
