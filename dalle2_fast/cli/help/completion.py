"""`dalle2-fast completion SHELL`: a script with which a shell completes commands, options and values."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "tcsh")
EXAMPLES = """\
  dalle2-fast completion bash > ~/.local/share/bash-completion/completions/dalle2-fast
  dalle2-fast completion zsh > ~/.zsh/completions/_dalle2-fast     # a folder of $fpath
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the argument of `dalle2-fast completion`."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def run(args: argparse.Namespace) -> int:
    """Print the script; the exit code."""
    try:
        import shtab
    except ImportError:
        raise ImportError(
            "completion needs the package shtab, which is not installed: pip install shtab"
        ) from None
    from dalle2_fast.cli import COMMANDS
    from dalle2_fast.cli.parser import make_parser

    print(shtab.complete(make_parser(COMMANDS, list(COMMANDS), aliases=False), shell=args.shell))
    return 0
