"""`dalle2-fast variations IMAGE`: other pictures of the same content (unCLIP, section 3.1)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli import arguments, picture
from dalle2_fast.cli import image as cli_image
from dalle2_fast.cli.job import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="the picture to vary")
    parser.add_argument(
        "--num-images", type=arguments.count, default=4, metavar="N", help="variations (default 4)"
    )
    parser.add_argument(
        "--eta", type=arguments.share, default=1.0, metavar="X",
        help="how random DDIM is, 0 to 1 (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--inversion-steps", type=arguments.count, metavar="N",
        help="start from the picture's own noise, found with N steps, without guidance by default (default: "
        "from other noise each time)",
    )  # fmt: skip
    parser.add_argument("--caption", help="a caption for the decoder (default: the picture alone decides)")
    arguments.add_seed(parser)
    arguments.add_decoder(parser)
    arguments.add_upsamplers(parser)
    arguments.add_output(parser, "IMAGE-variations")


def run(args: argparse.Namespace) -> int:
    if args.inversion_steps is not None:
        arguments.start_from_own_noise(args)
    job = Job(args, f"{args.image.stem}-variations")
    opened = cli_image.open_image(args.image, "image")
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil

    image = job.square(opened, args.image)
    made = pipe.variations(
        image, args.num_images, eta=args.eta, inversion_steps=args.inversion_steps, prompt=args.caption,
        **job.shared(),
    )  # fmt: skip
    pictures = to_pil(resized(image, job.size)) + to_pil(made.images)
    labels = ["source", *(f"variation {index + 1}" for index in range(args.num_images))]
    texts = {"image": args.image.name, "eta": args.eta}
    return job.write(pictures, made.seconds, texts=texts, labels=labels, columns=picture.WIDEST)
