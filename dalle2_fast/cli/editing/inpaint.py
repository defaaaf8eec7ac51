"""`dalle2-fast inpaint IMAGE [CAPTION]`: repaint a part of an image and keep the rest (GLIDE, RePaint)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli import arguments
from dalle2_fast.cli.image_files import MAX_COLUMNS, open_image
from dalle2_fast.cli.job import Job

EXAMPLES = """\
  dalle2-fast inpaint photo.png "a blue star" --box 0.5,0,1,1
  dalle2-fast inpaint photo.png --mask mask.png --resample 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast inpaint`."""
    parser.add_argument("image", type=Path, help="the image to change")
    parser.add_argument(
        "caption",
        nargs="?",
        type=arguments.caption,
        help="a caption of the whole result (default: the kept part decides)",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="an image of the same size: repaint where it is light, keep where it is dark",
    )
    where.add_argument(
        "--box",
        type=_box,
        metavar="L,T,R,B",
        help="repaint a box; its left, top, right and bottom, each a fraction of the side: 0.5,0,1,1",
    )
    arguments.add_num_images(parser)
    parser.add_argument(
        "--resample",
        type=arguments.positive_int,
        default=1,
        metavar="N",
        help="sample each stretch of steps N times, for fewer seams (default 1; RePaint: 10)",
    )
    parser.add_argument(
        "--jump", type=arguments.positive_int, default=10, metavar="N", help="steps of a stretch (default 10)"
    )
    arguments.add_seed(parser)
    arguments.add_decoder(parser)
    arguments.add_candidates(parser)
    arguments.add_prior(parser)
    arguments.add_upsamplers(parser)
    arguments.add_sampler(parser)
    arguments.add_output(parser, "IMAGE-inpainted")


def run(args: argparse.Namespace) -> int:
    """Inpaint and write; the exit code."""
    job = Job(args, f"{args.image.stem}-{args.caption or 'inpainted'}")
    opened = open_image(args.image, "image")
    opened_mask = None if args.mask is None else open_image(args.mask, "--mask")
    if opened_mask is not None and opened_mask.size != opened.size:
        sizes = f"{opened.width} x {opened.height}, got {opened_mask.width} x {opened_mask.height}"
        raise ValueError(f"--mask: expected the image's size {sizes}")
    pipe = job.load()
    import torch

    from dalle2_fast.data.images import as_mask, central_square, from_pil, resized, resized_mask, to_pil

    image = job.square(opened, args.image)
    if opened_mask is not None:
        light = central_square(from_pil(opened_mask)).mean(1, keepdim=True) >= 0.5
        mask = as_mask("--mask", light, "cpu")
    else:
        side = job.size
        left, top, right, bottom = (round(side * fraction) for fraction in args.box)
        mask = torch.zeros(1, 1, side, side, dtype=torch.bool)
        mask[..., top:bottom, left:right] = True
    if not mask.any():
        raise ValueError("--mask, --box: expected something to repaint, got nothing")
    made = pipe.inpaint(
        image,
        mask,
        args.caption,
        args.num_images,
        resample=args.resample,
        jump=args.jump,
        **job.options(),
    )
    source = resized(image, job.size)
    masked = torch.where(resized_mask(mask, job.size), 0.5, source)
    images = to_pil(torch.cat([source, masked])) + to_pil(made.images)
    labels = ["source", "to be repainted", *["repainted"] * args.num_images]
    texts = {"image": args.image.name, "caption": args.caption or ""}
    return job.write(images, made.seconds, made.graphs, texts=texts, labels=labels, columns=MAX_COLUMNS)


def _box(text: str) -> tuple[float, ...]:
    sides = tuple(arguments.fraction(part) for part in text.split(","))
    if len(sides) != 4 or sides[0] >= sides[2] or sides[1] >= sides[3]:
        raise argparse.ArgumentTypeError(
            f"expected left,top,right,bottom with left < right and top < bottom, got {text!r}"
        )
    return sides
