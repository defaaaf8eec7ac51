"""`dalle2-fast interpolate FIRST SECOND`: from one image to another (unCLIP, section 3.2)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli import arguments
from dalle2_fast.cli.image_files import MAX_COLUMNS, open_image
from dalle2_fast.cli.job import Job

EXAMPLES = """\
  dalle2-fast interpolate first.png second.png --frames 8
  dalle2-fast interpolate first.png second.png --noise slerp -o way.webp
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast interpolate`."""
    parser.add_argument("first", type=Path, help="the image to begin with")
    parser.add_argument("second", type=Path, help="the image to end with")
    parser.add_argument(
        "--frames",
        type=arguments.positive_int,
        default=6,
        metavar="N",
        help="images, at least 2 (default 6)",
    )
    parser.add_argument(
        "--noise",
        choices=("fixed", "slerp"),
        default="fixed",
        help="the same noise for all frames (default), or from that of the first image to that of the "
        "second, without guidance by default",
    )
    parser.add_argument(
        "--inversion-steps",
        type=arguments.positive_int,
        default=50,
        metavar="N",
        help="DDIM steps that find the images' noise with --noise slerp (default 50)",
    )
    arguments.add_decoder_caption(parser, "images alone decide")
    arguments.add_seed(parser)
    arguments.add_decoder(parser)
    arguments.add_upsamplers(parser)
    arguments.add_output(parser, "FIRST-SECOND")


def run(args: argparse.Namespace) -> int:
    """Interpolate and write; the exit code."""
    if args.frames < 2:
        raise ValueError(f"--frames: expected at least 2, got {args.frames}")
    if args.noise == "slerp":
        arguments.default_to_no_guidance(args)
    job = Job(args, f"{args.first.stem}-{args.second.stem}")
    opened = [open_image(args.first, "first"), open_image(args.second, "second")]
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil

    first, second = (
        job.square(image, path) for image, path in zip(opened, (args.first, args.second), strict=True)
    )
    made = pipe.interpolate(
        first,
        second,
        args.frames,
        noise=args.noise,
        inversion_steps=args.inversion_steps,
        prompt=args.caption,
        **job.options(),
    )
    ends = [to_pil(resized(image, job.size))[0] for image in (first, second)]
    images = [ends[0], *to_pil(made.images), ends[1]]
    thetas = (f"theta {index / (args.frames - 1):.2f}" for index in range(args.frames))
    labels = ["first", *thetas, "second"]
    texts = {"images": f"{args.first.name}, {args.second.name}", "noise": args.noise}
    return job.write(images, made.seconds, made.graphs, texts=texts, labels=labels, columns=MAX_COLUMNS)
