"""`dalle2-fast serve`: OpenAI's images API on a checkpoint, see docs/serving.md."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from urllib.parse import urlsplit

from dalle2_fast.cli import arguments
from dalle2_fast.cli.people.address import add_address
from dalle2_fast.pipeline.compilation import BACKENDS
from dalle2_fast.pipeline.device import DTYPES, choose_device, choose_dtype
from dalle2_fast.serving.limits import Limits

KEY = "DALLE2_FAST_API_KEY"
MEBIBYTE = 2**20
DEFAULT = Limits()
EXAMPLES = """\
  dalle2-fast serve
  dalle2-fast serve --checkpoint runs/mine --device cuda --port 9000 --max-batch 32
  DALLE2_FAST_API_KEY=... dalle2-fast serve --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/images/generations -H "Content-Type: application/json" \\
    -d '{"prompt": "three green stars", "n": 2, "seed": 7}'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast serve`."""
    where = arguments.section(parser, "where")
    add_address(where, 8000)
    where.add_argument(
        "--public-url", type=_url, metavar="URL",
        help="how clients reach the server, for the URLs of pictures (default: as they address it)",
    )  # fmt: skip
    where.add_argument(
        "--api-key", metavar="KEY",
        help=f"clients must send it; other users of this machine can read it here, but not in the "
        f"environment variable {KEY} (default: none)",
    )  # fmt: skip

    model = arguments.section(parser, arguments.RUN)
    arguments.add_checkpoint(model)
    model.add_argument("--device", default="auto", help=arguments.DEVICE_HELP)
    model.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="as for generate")
    model.add_argument("--compile", choices=BACKENDS, help="as for generate")
    model.add_argument("--graphs", action=argparse.BooleanOptionalAction, help="as for generate")

    batches = arguments.section(parser, "batches and queue")
    _count(batches, "--max-batch", DEFAULT.max_batch, "pictures drawn at a time, candidates included")
    _number(batches, "--max-wait", 1000 * DEFAULT.max_wait, "MS",
            "milliseconds that a picture waits for others to share its batch")  # fmt: skip
    _count(batches, "--max-queue", DEFAULT.max_queue, "pictures that may wait; beyond it: status 429")
    _number(batches, "--timeout", DEFAULT.timeout, "S", "seconds that a request may take; then status 504")
    _number(batches, "--grace", 30, "S", "seconds after SIGTERM in which accepted requests are finished")

    limits = arguments.section(parser, "limits")
    _count(limits, "--max-images", DEFAULT.max_images, "the largest n of a request")
    _count(limits, "--max-steps", DEFAULT.max_steps, "the largest number of steps of a request")
    _number(limits, "--max-body", DEFAULT.max_body / MEBIBYTE, "MB", "MiB of a request")
    _count(limits, "--max-pixels", DEFAULT.max_pixels, "width times height of an uploaded image")
    _number(limits, "--url-seconds", DEFAULT.url_seconds, "S", "how long a picture has its URL")
    _number(limits, "--url-memory", DEFAULT.url_bytes / MEBIBYTE, "MB", "MiB of all pictures that have one")
    parser.add_argument("-q", "--quiet", action="store_true", help="no line for each request")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code."""
    key = _key(args.api_key)
    limits = Limits(
        max_batch=args.max_batch,
        max_wait=args.max_wait / 1000,
        max_queue=args.max_queue,
        timeout=args.timeout,
        max_images=args.max_images,
        max_steps=args.max_steps,
        max_body=int(args.max_body * MEBIBYTE),
        max_pixels=args.max_pixels,
        url_seconds=args.url_seconds,
        url_bytes=int(args.url_memory * MEBIBYTE),
    )
    try:
        from dalle2_fast.serving.app import create_app
        from dalle2_fast.serving.run import bind, is_loopback, run_server, url_of
    except ImportError as error:
        raise ImportError(f'serve: {error}; install it with pip install "dalle2-fast[serve]"') from None
    bound = bind(args.host, args.port)
    try:
        device = choose_device(args.device)
        dtype = choose_dtype(args.dtype, device)
        from dalle2_fast.pipeline.compilation.graphs import check_graphs
        from dalle2_fast.pipeline.dalle2 import DALLE2

        graphs = "auto" if args.graphs is None else args.graphs
        check_graphs(graphs, device, "--graphs")
        pipe = DALLE2.from_pretrained(args.checkpoint, device=device, dtype=dtype)
        if args.compile is not None:
            pipe.compile(args.compile)
        logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
        logging.getLogger("dalle2_fast.serving.access").setLevel(
            logging.WARNING if args.quiet else logging.INFO
        )
        app = create_app(pipe, limits, api_key=key, public_url=args.public_url, graphs=graphs)
        if key is None and not is_loopback(bound):
            reach = f"other machines can reach {url_of(bound)}, and there is no --api-key"
            print(f"warning: {reach}: anyone there can draw pictures", file=sys.stderr)
        sizes = ", ".join(f"{side} x {side}" for side in pipe.sizes)
        how = f"{device}, {str(dtype).removeprefix('torch.')}"
        line = f"serving at {url_of(bound)} ({sizes}; {how})"
        run_server(app, bound, grace=args.grace, on_start=lambda: print(line, flush=True))
    finally:
        bound.close()
    return 0


def _key(given: str | None) -> str | None:
    """The key of the option or of the environment; ValueError for one that cannot be sent."""
    name, key = ("--api-key", given) if given is not None else (KEY, os.environ.get(KEY))
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"{name}: expected ASCII letters, digits and signs without blanks, got another key")
    return key


def _count(group: argparse._ArgumentGroup, name: str, default: int, what: str) -> None:
    kind = arguments.positive_int
    group.add_argument(name, type=kind, default=default, metavar="N", help=f"{what} (default {default})")


def _number(group: argparse._ArgumentGroup, name: str, default: float, unit: str, what: str) -> None:
    kind = arguments.non_negative_float
    group.add_argument(name, type=kind, default=default, metavar=unit, help=f"{what} (default {default:g})")


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise argparse.ArgumentTypeError(f"expected http://HOST or https://HOST, got {text!r}")
    return text
