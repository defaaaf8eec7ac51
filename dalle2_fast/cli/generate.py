"""`dalle2-fast generate CAPTION ...`: images of one caption or some as a grid, and the seconds of each stage.

With --prompts FILE in place of the captions, pictures of many captions: see bulk/generation.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle2_fast.cli import arguments
from dalle2_fast.cli.image_files import MAX_COLUMNS, open_image
from dalle2_fast.cli.job import Job

MAX_CAPTIONS = 32  # rows of a grid
LETTER_WIDTH = 6  # pixels, of a label's font in the mean
EXAMPLES = """\
  dalle2-fast generate "a large red circle above a small blue square"
  dalle2-fast generate "three green stars" "a pink heart" -n 2 -s 7 -o both.jpg
  dalle2-fast generate "a red ring" --negative "a blue ring" --guidance 4 --steps 25
  printf "a red ring\\na blue ring\\n" | dalle2-fast generate - --json
  dalle2-fast generate --prompts captions.txt -o pictures -n 4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast generate`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "captions",
        nargs="*",
        default=[],
        type=arguments.caption,
        metavar="caption",
        help="what to draw; several captions are the rows of the grid; - reads them from standard input, one "
        "per line",
    )
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="many captions instead: one per line (- for standard input), or .csv, .tsv, .jsonl, .parquet "
        "with a column caption or text; --output is then the folder of the pictures, which the same command "
        "continues; torchrun may start it as several processes",
    )
    arguments.add_num_images(parser, "images of each caption (default 4; 1 with --prompts)", None)
    images = arguments.section(parser, arguments.IMAGES)
    images.add_argument(
        "--shard-size",
        type=arguments.positive_int,
        metavar="N",
        help="with --prompts: write WebDataset shards of N pictures instead of plain files",
    )
    arguments.add_seed(parser)
    images.add_argument(
        "--init-image", type=Path, metavar="FILE", help="an image for the decoder to start from; shown first"
    )
    images.add_argument(
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
    args.captions = _read(args.captions)
    args.num_images = 4 if args.num_images is None else args.num_images
    if args.shard_size is not None:
        raise ValueError("--shard-size: expected together with --prompts FILE")
    if args.strength is not None and args.init_image is None:
        raise ValueError("--strength: expected together with --init-image FILE")
    captions, several = args.captions, len(args.captions) > 1
    if several and args.init_image is not None:
        raise ValueError(f"--init-image: expected a single caption with it, got {len(captions)}")
    job = Job(args, f"{captions[0]} and {len(captions) - 1} more" if several else captions[0])
    opened = None if args.init_image is None else open_image(args.init_image, "--init-image")
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil

    start: dict[str, Any] = {}
    shown, labels, columns = [], None, None
    each = [caption for caption in captions for _ in range(args.num_images)]
    if opened is not None:
        image = job.square(opened, args.init_image)
        strength = 0.6 if args.strength is None else args.strength
        start = {"init_image": image, "strength": strength}
        shown = to_pil(resized(image, job.size))
        labels = ["start", *[f"strength {strength:g}"] * args.num_images]
        columns = MAX_COLUMNS
    elif several:
        labels, columns = [_shortened(caption, job.size) for caption in each], args.num_images
    made = pipe.generate(captions if several else captions[0], args.num_images, **job.options(), **start)
    images = shown + to_pil(made.images)
    texts = {"captions": json.dumps(captions)} if several else {"caption": captions[0]}
    return job.write(
        images,
        made.seconds,
        made.graphs,
        texts=texts,
        lines={"captions": len(captions)} if several else None,
        labels=labels,
        columns=columns,
        captions=each if several else None,
    )


def _read(given: Sequence[str]) -> list[str]:
    """The captions of the command line, with those of standard input in place of "-"."""
    if len(given) > 1 and not any(" " in caption or caption == "-" for caption in given):
        raise ValueError(
            f"caption: a caption of several words needs quotes around it, got {' '.join(given)} as "
            f"{len(given)} captions (captions of one word each are read from standard input: -)"
        )
    if given.count("-") > 1:
        raise ValueError("caption: standard input (-) can be read once")
    captions: list[str] = []
    for caption in given:
        captions += _lines() if caption == "-" else [caption]
    if len(captions) > MAX_CAPTIONS:
        raise ValueError(
            f"caption: a grid has up to {MAX_CAPTIONS} captions, got {len(captions)}; --prompts FILE "
            "--output DIR makes files of them"
        )
    return captions


def _lines() -> list[str]:
    try:
        text = "" if sys.stdin is None else sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"caption: standard input: expected text in UTF-8 ({error})") from None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError("caption: standard input: expected at least one caption, got none")
    return lines


def _shortened(caption: str, side: int) -> str:
    """A label that does not widen an image of `side` pixels."""
    room = max(8, side // LETTER_WIDTH)
    return caption if len(caption) <= room else f"{caption[: room - 3].rstrip()}..."
