"""`dalle2-fast evaluate`: scores of a checkpoint, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dalle2_fast.cli.arguments import DEVICE_HELP, add_guidance_interval, add_json
from dalle2_fast.cli.image_files import check_writable
from dalle2_fast.evaluation.amounts import FULL, PARTS, QUICK, SETTINGS, SPLITS, Amounts
from dalle2_fast.pipeline.device import choose_device
from dalle2_fast.pipeline.settings import SAMPLERS

if TYPE_CHECKING:
    from dalle2_fast.data.synthetic.world import World
    from dalle2_fast.pipeline.dalle2 import DALLE2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast evaluate`."""
    add = parser.add_argument
    add("--checkpoint", default="embedded", metavar="DIR", help="a checkpoint folder, or embedded (default)")
    add(
        "--captions",
        type=int,
        metavar="N",
        help=f"captions per split of which an image is made (default {FULL.captions})",
    )
    add(
        "--clip-captions",
        type=int,
        metavar="N",
        help=f"N of CLIP's N-way retrieval (default {FULL.clip_captions})",
    )
    add(
        "--training-captions",
        type=int,
        metavar="N",
        help=f"training captions of the nearest-image baseline (default {FULL.training_captions})",
    )
    add(
        "--pictures",
        type=int,
        metavar="N",
        help=f"images that are upsampled, and that are denoised (default {FULL.pictures})",
    )
    add(
        "--outlines",
        type=int,
        metavar="N",
        help=f"images of each shape for the outline scores (default {FULL.outlines})",
    )
    add(
        "--splits",
        nargs="+",
        choices=SPLITS,
        help="iid: as in training; comp: with held-out (shape, colour) pairs",
    )
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to score (default: all)")
    add("--seed", type=int, default=0, help="of the scenes, captions and noise (default 0)")
    add("--steps", type=int, help="diffusion steps of the decoder (default, as below: the checkpoint's)")
    add("--guidance", type=float, help="guidance scale of the decoder")
    add_guidance_interval(parser, "--guidance-interval", "guidance of the decoder")
    add("--candidates", type=int, help="images sampled for each caption, of which CLIP chooses one")
    add("--prior-steps", type=int, help="diffusion steps of the prior")
    add("--prior-guidance", type=float, help="guidance scale of the prior")
    add_guidance_interval(parser, "--prior-guidance-interval", "guidance of the prior")
    add("--upsampler-steps", type=int, help="diffusion steps of the upsampler")
    add("--sampler", choices=SAMPLERS, help="update rule of every stage")
    add(
        "--batch-size",
        type=int,
        default=16,
        help="captions at a time (default 16); they share their noise, so that scores are less certain the "
        "more they are",
    )
    add("--quick", action="store_true", help="few captions: a quick check with rough scores")
    add("--device", default="auto", help=DEVICE_HELP)
    add("--output", type=Path, metavar="FILE.json", help="also write everything to this file")
    add_json(parser)
    add("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Score, print the table and write the JSON file.

    Returns:
        The exit code, 0.

    Raises:
        ValueError, OSError: what the user can correct.
    """
    given = {name: getattr(args, name) for name in Amounts._fields if getattr(args, name) is not None}
    amounts = (QUICK if args.quick else FULL)._replace(**given)
    for name, value in {**amounts._asdict(), "batch_size": args.batch_size}.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed: expected 0 to 2^32 - 1, got {args.seed}")
    if args.output is not None:
        _check_output(args.output)
    device = choose_device(args.device)
    from dalle2_fast.checkpoints.atomic import atomic_write
    from dalle2_fast.evaluation.measure import evaluate
    from dalle2_fast.evaluation.report import print_report
    from dalle2_fast.pipeline.dalle2 import DALLE2

    path = None if args.checkpoint == "embedded" else Path(args.checkpoint)
    pipe = DALLE2.from_pretrained(path, device=device, dtype="fp32")
    world = _world(pipe)
    report = evaluate(
        pipe,
        world,
        splits=_splits(args.splits, world),
        parts=tuple(args.parts),
        amounts=amounts,
        seed=args.seed,
        settings={name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None},
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    report = {"checkpoint": args.checkpoint, **report}
    if args.json:
        print(json.dumps(report))
    else:
        print_report(report)
    if args.output is not None:
        with atomic_write(args.output) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if not args.json:
            print(f"written: {args.output}")
    return 0


def _world(pipe: DALLE2) -> World:
    from dalle2_fast.checkpoints import CheckpointError
    from dalle2_fast.data.synthetic.world import World

    config = pipe.metadata.get("world")
    if config is None:
        raise CheckpointError(
            "--checkpoint: expected one that was trained on scenes, with their world in its metadata; "
            "without it nothing says what the images should show"
        )
    return World.from_config(config)


def _splits(asked: list[str] | None, world: World) -> tuple[str, ...]:
    """The splits that the world has; ValueError if an empty one was asked for."""
    from dalle2_fast.data.synthetic.scenes import held_out_pairs

    held = held_out_pairs()[world.ids("shapes")][:, world.ids("colors")].any()
    if held:
        return tuple(dict.fromkeys(asked or SPLITS))
    if asked and "comp" in asked:
        raise ValueError("--splits: comp is empty: this checkpoint's world has none of the held-out pairs")
    return ("iid",)


def _check_output(path: Path) -> None:
    """Raise if the file could not be written, before the minutes that scoring takes."""
    if path.suffix.lower() != ".json":
        raise ValueError(f"--output: expected a name that ends in .json, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output: the folder {path.absolute().parent} does not exist")
    check_writable(path, "--output")
