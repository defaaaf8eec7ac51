"""`dalle2-fast invert IMAGE`: the noise of an image, and what is sampled from it (unCLIP, section 3)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dalle2_fast.cli import arguments
from dalle2_fast.cli.image_files import MAX_COLUMNS, open_image
from dalle2_fast.cli.job import Job

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN_SIDE = 256  # pixels of an image in the grid, because the decoder's images are small

EXAMPLES = """\
  dalle2-fast invert photo.png --steps 100 --refine 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast invert`."""
    parser.add_argument("image", type=Path, help="the image to find the noise of")
    parser.add_argument(
        "--steps",
        type=arguments.positive_int,
        default=50,
        metavar="N",
        help="DDIM steps of the inversion, and of sampling again (default 50, at least 2)",
    )
    parser.add_argument(
        "--guidance",
        type=arguments.non_negative_float,
        default=1.0,
        metavar="X",
        help="guidance scale of both (default 1: none)",
    )
    arguments.add_guidance_interval(parser, "--guidance-interval", "guidance of both")
    parser.add_argument(
        "--refine",
        type=arguments.non_negative_int,
        default=0,
        metavar="N",
        help="repeat each inversion step N times, so that sampling inverts it more exactly (default 0)",
    )
    arguments.add_decoder_caption(parser)
    arguments.add_seed(parser)
    arguments.add_output(parser, "IMAGE-inverted")


def run(args: argparse.Namespace) -> int:
    """Invert, sample again and write; the exit code."""
    if args.steps < 2:
        raise ValueError(f"--steps: expected at least 2, got {args.steps}")
    job = Job(args, f"{args.image.stem}-inverted")
    opened = open_image(args.image, "image")
    pipe = job.load()
    from dalle2_fast.data.images import to_pil
    from dalle2_fast.evaluation.psnr import psnr

    image = job.square(opened, args.image, pipe.decoder.image_size)
    shared = dict(batch_size=args.batch_size, progress=job.progress)
    guided = dict(guidance=args.guidance, guidance_interval=args.guidance_interval)
    pair = pipe.invert(image, steps=args.steps, prompt=args.caption, refine=args.refine, **guided, **shared)
    made = pipe.decode(
        pair.image_embed,
        x_T=pair.x_T,
        prompt=args.caption,
        steps=args.steps,
        size=pipe.decoder.image_size,
        seed=job.seed,
        **guided,
        graphs=job.graphs,
        **shared,
    )
    noise = pair.x_T / 6 + 0.5  # [0, 1] is three standard deviations to either side
    images = [_enlarge(to_pil(x)[0]) for x in (pair.image, noise, made.images)]
    found = f"{psnr(made.images, pair.image)[0]:.2f} dB"
    labels = ["source", f"noise, deviation {pair.x_T.std():.2f}", f"sampled from it, {found}"]
    texts = {"image": args.image.name, "steps": args.steps, "guidance": args.guidance, "psnr": found}
    lines = {"PSNR": f"{found} after {args.steps} steps of inversion and {args.steps} of sampling"}
    seconds, options = pair.seconds | made.seconds, dict(labels=labels, columns=MAX_COLUMNS, lines=lines)
    return job.write(images, seconds, made.graphs, texts=texts, **options)


def _enlarge(image: Image) -> Image:
    from PIL import Image

    factor = max(1, SHOWN_SIDE // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
