"""`dalle2-fast invert IMAGE`: the noise that draws a picture, and what it draws (unCLIP, section 3)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli import arguments
from dalle2_fast.cli import image as cli_image
from dalle2_fast.cli import picture as cli_picture
from dalle2_fast.cli.job import Job

SHOWN = 256  # side of a picture in the grid: the decoder's are small


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="the picture to find the noise of")
    parser.add_argument(
        "--steps", type=arguments.count, default=50, metavar="N",
        help="there, and as many back (default 50, at least 2)",
    )  # fmt: skip
    parser.add_argument(
        "--guidance", type=arguments.scale, default=1.0, metavar="X",
        help="on both ways (default 1: none)",
    )  # fmt: skip
    parser.add_argument(
        "--refine", type=arguments.count_or_none, default=0, metavar="N",
        help="make each step N times again, nearer to one that leads back (default 0)",
    )  # fmt: skip
    parser.add_argument("--caption", help="a caption for the decoder (default: the picture alone decides)")
    arguments.add_seed(parser)
    arguments.add_output(parser, "IMAGE-inverted")


def run(args: argparse.Namespace) -> int:
    if args.steps < 2:
        raise ValueError(f"--steps: expected at least 2, got {args.steps}")
    job = Job(args, f"{args.image.stem}-inverted")
    opened = cli_image.open_image(args.image, "image")
    pipe = job.load()
    from dalle2_fast.data.images import to_pil
    from dalle2_fast.evaluation.psnr import psnr

    image = job.square(opened, args.image, pipe.decoder.image_size)
    options = dict(batch_size=args.batch_size, progress=not args.quiet)
    pair = pipe.invert(
        image, steps=args.steps, guidance=args.guidance, prompt=args.caption, refine=args.refine, **options
    )
    back = pipe.decode(
        pair.image_embed, x_T=pair.x_T, prompt=args.caption, steps=args.steps, guidance=args.guidance,
        size=pipe.decoder.image_size, seed=job.seed, **options,
    )  # fmt: skip
    noise = pair.x_T / 6 + 0.5  # three deviations to either side
    pictures = [_enlarged(to_pil(x)[0]) for x in (pair.image, noise, back.images)]
    found = f"{psnr(back.images, pair.image)[0]:.2f} dB"
    labels = ["source", f"noise, deviation {pair.x_T.std():.2f}", f"drawn from it, {found}"]
    texts = {"image": args.image.name, "steps": args.steps, "guidance": args.guidance, "psnr": found}
    return job.write(
        pictures, pair.seconds | back.seconds, texts=texts, labels=labels, columns=cli_picture.WIDEST,
        lines={"PSNR": f"{found} after {args.steps} steps there and {args.steps} back"},
    )  # fmt: skip


def _enlarged(picture):
    from PIL import Image

    factor = max(1, SHOWN // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
