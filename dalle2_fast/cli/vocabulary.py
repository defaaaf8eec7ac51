"""`dalle2-fast vocabulary`: the words that a checkpoint knows."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the one in the package")


def run(args: argparse.Namespace) -> int:
    from dalle2_fast.checkpoints import construct, embedded_path, load_config
    from dalle2_fast.data import BPETokenizer, tokenizer_from_config

    path = args.checkpoint or embedded_path()
    tokenizer = construct(tokenizer_from_config, load_config(path), "tokenizer", path)
    if isinstance(tokenizer, BPETokenizer):
        print(
            f"Any text: it is read as byte pairs of {tokenizer.vocab_size:,} kinds; a caption holds at most "
            f"{tokenizer.context_length - 2}."
        )
        return 0
    words = sorted(tokenizer.words)
    print(
        f"{len(words)} words; a caption holds at most {tokenizer.context_length - 2}."
    )  # less begin and end
    print(
        textwrap.fill(
            " ".join(words), width=min(100, shutil.get_terminal_size().columns), break_on_hyphens=False
        )
    )
    return 0
