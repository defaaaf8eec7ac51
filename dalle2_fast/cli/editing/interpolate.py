"""`dalle2-fast interpolate FIRST SECOND`: from one picture to another (unCLIP, section 3.2)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli import arguments
from dalle2_fast.cli import image as cli_image
from dalle2_fast.cli import picture as cli_picture
from dalle2_fast.cli.job import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, help="the picture to begin with")
    parser.add_argument("second", type=Path, help="the picture to end with")
    parser.add_argument(
        "--frames", type=arguments.count, default=6, metavar="N", help="pictures, at least 2 (default 6)"
    )
    parser.add_argument(
        "--noise", choices=("fixed", "slerp"), default="fixed",
        help="one noise for all frames (default), or from that of the first picture to that of the second, "
        "without guidance by default",
    )  # fmt: skip
    parser.add_argument(
        "--inversion-steps", type=arguments.count, default=50, metavar="N",
        help="to find the pictures' noise with --noise slerp (default 50)",
    )  # fmt: skip
    parser.add_argument("--caption", help="a caption for the decoder (default: the pictures alone decide)")
    arguments.add_seed(parser)
    arguments.add_decoder(parser)
    arguments.add_upsamplers(parser)
    arguments.add_output(parser, "FIRST-SECOND")


def run(args: argparse.Namespace) -> int:
    if args.frames < 2:
        raise ValueError(f"--frames: expected at least 2, got {args.frames}")
    if args.noise == "slerp":
        arguments.start_from_own_noise(args)
    job = Job(args, f"{args.first.stem}-{args.second.stem}")
    opened = [cli_image.open_image(getattr(args, name), name) for name in ("first", "second")]
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil

    first, second = (
        job.square(picture, path)
        for picture, path in zip(opened, (args.first, args.second), strict=True)
    )
    made = pipe.interpolate(
        first, second, args.frames, noise=args.noise, inversion_steps=args.inversion_steps,
        prompt=args.caption, **job.shared(),
    )  # fmt: skip
    ends = [to_pil(resized(image, job.size))[0] for image in (first, second)]
    pictures = [ends[0], *to_pil(made.images), ends[1]]
    thetas = (f"theta {index / (args.frames - 1):.2f}" for index in range(args.frames))
    texts = {"images": f"{args.first.name}, {args.second.name}", "noise": args.noise}
    return job.write(
        pictures, made.seconds, texts=texts, labels=["first", *thetas, "second"], columns=cli_picture.WIDEST
    )
