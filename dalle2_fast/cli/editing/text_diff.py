"""`dalle2-fast text-diff IMAGE --from A --to B`: change an image by two captions (unCLIP, section 3.3)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli import arguments
from dalle2_fast.cli.image_files import MAX_COLUMNS, open_image
from dalle2_fast.cli.job import Job

EXAMPLES = """\
  dalle2-fast text-diff photo.png --from "a small red circle" --to "a large red circle"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast text-diff`."""
    parser.add_argument("image", type=Path, help="the image to change")
    shared = dict(required=True, type=arguments.caption, metavar="CAPTION")
    parser.add_argument("--from", dest="source", **shared, help="what it shows")
    parser.add_argument("--to", dest="target", **shared, help="what it is to show")
    parser.add_argument(
        "--theta",
        type=arguments.fraction,
        default=0.35,
        metavar="X",
        help="how far to turn its embedding, 0 to 1 (default 0.35; the paper: 0.25 to 0.5)",
    )
    parser.add_argument(
        "--frames",
        type=arguments.positive_int,
        default=5,
        metavar="N",
        help="images from theta 0 to X, at least 2 (default 5)",
    )
    parser.add_argument(
        "--inversion-steps",
        type=arguments.non_negative_int,
        default=50,
        metavar="N",
        help="DDIM steps that find the image's noise, without guidance by default (default 50); 0: noise "
        "from the seed",
    )
    arguments.add_seed(parser)
    arguments.add_decoder(parser)
    arguments.add_upsamplers(parser)
    arguments.add_output(parser, "IMAGE-TO")


def run(args: argparse.Namespace) -> int:
    """Change the image and write; the exit code."""
    if args.frames < 2:
        raise ValueError(f"--frames: expected at least 2, got {args.frames}")
    if args.inversion_steps:
        arguments.default_to_no_guidance(args)
    job = Job(args, f"{args.image.stem}-{args.target}")
    opened = open_image(args.image, "image")
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil

    image = job.square(opened, args.image)
    made = pipe.text_diff(
        image,
        args.source,
        args.target,
        args.frames,
        theta=args.theta,
        inversion_steps=args.inversion_steps or None,
        **job.options(),
    )
    images = to_pil(resized(image, job.size)) + to_pil(made.images)
    thetas = (f"theta {args.theta * index / (args.frames - 1):.2f}" for index in range(args.frames))
    labels = ["source", *thetas]
    texts = {"image": args.image.name, "from": args.source, "to": args.target, "theta": args.theta}
    return job.write(images, made.seconds, made.graphs, texts=texts, labels=labels, columns=MAX_COLUMNS)
