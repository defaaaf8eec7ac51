"""`dalle2-fast generate CAPTION`: images of a caption as a PNG grid, and the seconds of each stage.

With --prompts FILE in place of the caption, pictures of many captions: see bulk/generation.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dalle2_fast.cli import arguments
from dalle2_fast.cli.image_files import MAX_COLUMNS, open_image
from dalle2_fast.cli.job import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast generate`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "caption",
        nargs="?",
        type=arguments.caption,
        help='e.g. "a large red circle above a small blue square"',
    )
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="many captions instead: one per line (- for standard input), or .csv, .tsv, .jsonl, .parquet "
        "with a column caption or text; --output is then the folder of the pictures, which the same command "
        "continues; torchrun may start it as several processes",
    )
    parser.add_argument(
        "--num-images",
        type=arguments.positive_int,
        metavar="N",
        help="images (default 4; 1 of each caption of --prompts)",
    )
    parser.add_argument(
        "--shard-size",
        type=arguments.positive_int,
        metavar="N",
        help="with --prompts: write WebDataset shards of N pictures instead of plain files",
    )
    arguments.add_seed(parser)
    parser.add_argument(
        "--init-image", type=Path, metavar="FILE", help="an image for the decoder to start from; shown first"
    )
    parser.add_argument(
        "--strength",
        type=arguments.positive_fraction,
        metavar="X",
        help="the part of the decoder's steps made from it: 1 forgets the image (default 0.6)",
    )
    arguments.add_decoder(parser)
    arguments.add_candidates(parser)
    arguments.add_prior(parser)
    arguments.add_upsamplers(parser)
    arguments.add_sampler(parser)
    arguments.add_output(parser, "CAPTION")


def run(args: argparse.Namespace) -> int:
    """Generate and write; the exit code."""
    if args.prompts is not None:
        from dalle2_fast.cli.bulk.generation import run as run_all

        return run_all(args)
    args.num_images = 4 if args.num_images is None else args.num_images
    if args.shard_size is not None:
        raise ValueError("--shard-size: expected together with --prompts FILE")
    if not args.caption.strip():
        raise ValueError("caption: expected words, got an empty caption")
    if args.strength is not None and args.init_image is None:
        raise ValueError("--strength: expected together with --init-image FILE")
    job = Job(args, args.caption)
    opened = None if args.init_image is None else open_image(args.init_image, "--init-image")
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil

    start: dict[str, Any] = {}
    shown, labels, columns = [], None, None
    if opened is not None:
        image = job.square(opened, args.init_image)
        strength = 0.6 if args.strength is None else args.strength
        start = {"init_image": image, "strength": strength}
        shown = to_pil(resized(image, job.size))
        labels = ["start", *[f"strength {strength:g}"] * args.num_images]
        columns = MAX_COLUMNS
    made = pipe.generate(args.caption, args.num_images, **job.options(), **start)
    images = shown + to_pil(made.images)
    texts = {"caption": args.caption}
    return job.write(images, made.seconds, made.graphs, texts=texts, labels=labels, columns=columns)
