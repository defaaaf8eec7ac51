"""`dalle2-fast generate CAPTION`: a PNG grid, and where the time went."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli import arguments, picture
from dalle2_fast.cli import image as cli_image
from dalle2_fast.cli.job import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("caption", help='what to draw, e.g. "a large red circle above a small blue square"')
    parser.add_argument(
        "--num-images", type=arguments.count, default=4, metavar="N", help="pictures (default 4)"
    )
    arguments.add_seed(parser)
    parser.add_argument(
        "--init-image", type=Path, metavar="FILE", help="a picture for the decoder to start from; shown first"
    )
    parser.add_argument(
        "--strength",
        type=arguments.strength,
        metavar="X",
        help="how much of the decoder's way is made from it: 1 forgets the picture (default 0.6)",
    )
    arguments.add_decoder(parser)
    arguments.add_candidates(parser)
    arguments.add_prior(parser)
    arguments.add_upsamplers(parser)
    arguments.add_sampler(parser)
    arguments.add_output(parser, "CAPTION")


def run(args: argparse.Namespace) -> int:
    if not args.caption.strip():
        raise ValueError("caption: expected words, got an empty caption")
    if args.strength is not None and args.init_image is None:
        raise ValueError("--strength: expected --init-image FILE beside it")
    job = Job(args, args.caption)
    opened = cli_image.open_image(args.init_image, "--init-image") if args.init_image is not None else None
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil

    start, source, labels, columns = {}, [], None, None
    if opened is not None:
        image = job.square(opened, args.init_image)
        strength = 0.6 if args.strength is None else args.strength
        start = {"init_image": image, "strength": strength}
    made = pipe.generate(args.caption, args.num_images, **job.shared(), **start)
    pictures = to_pil(made.images)
    if opened is not None:
        source = to_pil(resized(image, job.size))
        labels = ["start", *[f"strength {strength:g}"] * len(pictures)]
        columns = picture.WIDEST
    texts = {"caption": args.caption}
    return job.write(source + pictures, made.seconds, texts=texts, labels=labels, columns=columns)
