"""The options --host and --port of what is served."""

from __future__ import annotations

import argparse


def add_address(parser: argparse._ActionsContainer, port: int) -> None:
    """Declare --host and --port; `port` is the default."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at (default 127.0.0.1: this machine alone)"
    )
    parser.add_argument("--port", type=_port, default=port, help=f"0 is any free one (default {port})")


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, got {text!r}")
    return int(text)
