"""`dalle2-fast demo`: a page in the browser for everything that the pipeline does, see docs/demo.md."""

from __future__ import annotations

import argparse
import sys

from dalle2_fast.cli import arguments
from dalle2_fast.cli.people.address import add_address
from dalle2_fast.pipeline.compilation import BACKENDS
from dalle2_fast.pipeline.device import DTYPES, choose_device, choose_dtype

EXAMPLES = """\
  dalle2-fast demo --open
  dalle2-fast demo --checkpoint runs/mine --device cuda --port 9000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast demo`."""
    where = arguments.section(parser, "where")
    add_address(where, 7860)
    where.add_argument("--open", action="store_true", help="open the page in a browser when it is ready")

    model = arguments.section(parser, arguments.RUN)
    arguments.add_checkpoint(model)
    model.add_argument("--device", default="auto", help=arguments.DEVICE_HELP)
    model.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="as for generate")
    model.add_argument("--compile", choices=BACKENDS, help="as for generate")
    model.add_argument("--batch-size", type=arguments.positive_int, metavar="N", help="as for generate")
    model.add_argument(
        "--preview", action=argparse.BooleanOptionalAction, default=True,
        help="show what each step has drawn so far (default); a GPU cannot replay such steps as CUDA graphs",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Serve the page until SIGTERM or Ctrl-C; the exit code."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(f'demo: {error}; install it with pip install "dalle2_fast[demo]"') from None
    from dalle2_fast.demo.page import make_page
    from dalle2_fast.demo.server import create_app, run_page
    from dalle2_fast.demo.studio import Studio
    from dalle2_fast.demo.worker import Worker
    from dalle2_fast.serving.run import bind, is_loopback, url_of

    bound = bind(args.host, args.port)  # before the weights load
    try:
        device = choose_device(args.device)
        dtype = choose_dtype(args.dtype, device)
        from dalle2_fast.pipeline.dalle2 import DALLE2

        pipe = DALLE2.from_pretrained(args.checkpoint, device=device, dtype=dtype)
        if args.compile is not None:
            pipe.compile(args.compile)
        checkpoint = "checkpoint of the package" if args.checkpoint is None else str(args.checkpoint)
        how = f"{device}, {str(dtype).removeprefix('torch.')}"
        studio, worker = Studio(pipe, batch_size=args.batch_size, preview=args.preview), Worker()
        app = create_app(make_page(studio, worker, (checkpoint, how)))
        url = url_of(bound)
        if not is_loopback(bound):
            print(f"warning: other machines can reach {url}: anyone there can draw pictures", file=sys.stderr)

        def started() -> None:
            print(f"the page is at {url} ({how})", flush=True)
            if args.open:
                import webbrowser

                webbrowser.open(url)

        run_page(app, bound, worker, started)
    finally:
        bound.close()
    return 0
