"""`dalle2-fast text-diff IMAGE --from A --to B`: change a picture by a caption (unCLIP, section 3.3)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli import arguments, picture
from dalle2_fast.cli import image as cli_image
from dalle2_fast.cli.job import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="the picture to change")
    parser.add_argument("--from", dest="source", required=True, metavar="CAPTION", help="what it shows")
    parser.add_argument("--to", dest="target", required=True, metavar="CAPTION", help="what it is to show")
    parser.add_argument(
        "--theta", type=arguments.share, default=0.35, metavar="X",
        help="how far to turn its embedding, 0 to 1 (default 0.35; the paper: 0.25 to 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--frames", type=arguments.count, default=5, metavar="N",
        help="pictures on the way, at least 2 (default 5)",
    )  # fmt: skip
    parser.add_argument(
        "--inversion-steps", type=arguments.count_or_none, default=50, metavar="N",
        help="to find the picture's own noise, without guidance by default (default 50); 0: the seed's noise",
    )  # fmt: skip
    arguments.add_seed(parser)
    arguments.add_decoder(parser)
    arguments.add_upsamplers(parser)
    arguments.add_output(parser, "IMAGE-TO")


def run(args: argparse.Namespace) -> int:
    if args.frames < 2:
        raise ValueError(f"--frames: expected at least 2, got {args.frames}")
    if args.inversion_steps:
        arguments.start_from_own_noise(args)
    job = Job(args, f"{args.image.stem}-{args.target}")
    opened = cli_image.open_image(args.image, "image")
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil

    image = job.square(opened, args.image)
    made = pipe.text_diff(
        image, args.source, args.target, args.frames, theta=args.theta,
        inversion_steps=args.inversion_steps or None, **job.shared(),
    )  # fmt: skip
    pictures = to_pil(resized(image, job.size)) + to_pil(made.images)
    thetas = (f"theta {args.theta * index / (args.frames - 1):.2f}" for index in range(args.frames))
    texts = {"image": args.image.name, "from": args.source, "to": args.target, "theta": args.theta}
    return job.write(
        pictures, made.seconds, texts=texts, labels=["source", *thetas], columns=picture.WIDEST
    )
