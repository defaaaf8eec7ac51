"""`dalle2-fast inpaint IMAGE [CAPTION]`: repaint a part of a picture and keep the rest (GLIDE, RePaint)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli import arguments, picture
from dalle2_fast.cli import image as cli_image
from dalle2_fast.cli.job import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="the picture to change")
    parser.add_argument(
        "caption", nargs="?", help="the whole picture as it is to be (default: what is kept decides)"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--mask", type=Path, metavar="FILE",
        help="a picture of the same size: repaint where it is light, keep where it is dark",
    )  # fmt: skip
    where.add_argument(
        "--box", type=_box, metavar="L,T,R,B",
        help="repaint a box; its left, top, right and bottom, each a part of the side: 0.5,0,1,1",
    )  # fmt: skip
    parser.add_argument(
        "--num-images", type=arguments.count, default=4, metavar="N", help="pictures (default 4)"
    )
    parser.add_argument(
        "--resample", type=arguments.count, default=1, metavar="N",
        help="go through each stretch of steps N times, for fewer seams (default 1; RePaint: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--jump", type=arguments.count, default=10, metavar="N", help="steps of a stretch (default 10)"
    )
    arguments.add_seed(parser)
    arguments.add_decoder(parser)
    arguments.add_prior(parser)
    arguments.add_upsamplers(parser)
    arguments.add_sampler(parser)
    arguments.add_output(parser, "IMAGE-inpainted")


def run(args: argparse.Namespace) -> int:
    if args.caption is not None and not args.caption.strip():
        raise ValueError("caption: expected words, got an empty caption")
    job = Job(args, f"{args.image.stem}-{args.caption or 'inpainted'}")
    opened = cli_image.open_image(args.image, "image")
    mask = None if args.mask is None else cli_image.open_image(args.mask, "--mask")
    if mask is not None and mask.size != opened.size:
        sizes = f"{opened.width} x {opened.height}, got {mask.width} x {mask.height}"
        raise ValueError(f"--mask: expected the picture's size {sizes}")
    pipe = job.load()
    import torch

    from dalle2_fast.data.images import as_mask, from_pil, middle_square, resized, resized_mask, to_pil

    image = job.square(opened, args.image)
    if mask is not None:
        light = as_mask("--mask", (middle_square(from_pil(mask)).mean(1, keepdim=True) >= 0.5), "cpu")
    else:
        side = job.size
        left, top, right, bottom = (round(side * part) for part in args.box)
        light = torch.zeros(1, 1, side, side, dtype=torch.bool)
        light[..., top:bottom, left:right] = True
    if not light.any():
        raise ValueError("--mask, --box: expected something to repaint, got nothing")
    made = pipe.inpaint(
        image, light, args.caption, args.num_images, resample=args.resample, jump=args.jump, **job.shared()
    )
    shown = resized(image, job.size)
    grey = torch.where(resized_mask(light, job.size), 0.5, shown)
    pictures = to_pil(torch.cat([shown, grey])) + to_pil(made.images)
    labels = ["source", "to be repainted", *["repainted"] * args.num_images]
    texts = {"image": args.image.name, "caption": args.caption or ""}
    return job.write(pictures, made.seconds, texts=texts, labels=labels, columns=picture.WIDEST)


def _box(text: str) -> tuple[float, ...]:
    parts = tuple(arguments.share(part) for part in text.split(","))
    if len(parts) != 4 or parts[0] >= parts[2] or parts[1] >= parts[3]:
        raise argparse.ArgumentTypeError(
            f"expected left,top,right,bottom with left < right and top < bottom, got {text!r}"
        )
    return parts
