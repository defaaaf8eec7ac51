"""`dalle2-fast variations IMAGE`: other images of the same content (unCLIP, section 3.1)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli import arguments
from dalle2_fast.cli.image_files import MAX_COLUMNS, open_image
from dalle2_fast.cli.job import Job

EXAMPLES = """\
  dalle2-fast variations photo.png -n 6
  dalle2-fast variations photo.png --eta 0.5 --caption "a red ring" -o others.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast variations`."""
    parser.add_argument("image", type=Path, help="the image to vary")
    arguments.add_num_images(parser, "variations (default 4)")
    parser.add_argument(
        "--eta",
        type=arguments.fraction,
        default=1.0,
        metavar="X",
        help="how random DDIM is, 0 to 1 (default 1)",
    )
    parser.add_argument(
        "--inversion-steps",
        type=arguments.positive_int,
        metavar="N",
        help="start from the image's noise, found with N DDIM steps, without guidance by default (default: "
        "start each variation from other noise)",
    )
    arguments.add_decoder_caption(parser)
    arguments.add_seed(parser)
    arguments.add_decoder(parser)
    arguments.add_upsamplers(parser)
    arguments.add_output(parser, "IMAGE-variations")


def run(args: argparse.Namespace) -> int:
    """Make the variations and write; the exit code."""
    if args.inversion_steps is not None:
        arguments.default_to_no_guidance(args)
    job = Job(args, f"{args.image.stem}-variations")
    opened = open_image(args.image, "image")
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil

    image = job.square(opened, args.image)
    made = pipe.variations(
        image,
        args.num_images,
        eta=args.eta,
        inversion_steps=args.inversion_steps,
        prompt=args.caption,
        **job.options(),
    )
    images = to_pil(resized(image, job.size)) + to_pil(made.images)
    labels = ["source", *(f"variation {index + 1}" for index in range(args.num_images))]
    texts = {"image": args.image.name, "eta": args.eta}
    return job.write(images, made.seconds, made.graphs, texts=texts, labels=labels, columns=MAX_COLUMNS)
