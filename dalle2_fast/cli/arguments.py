"""Arguments that the commands which draw share, and the kinds of numbers they take."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from dalle2_fast.pipeline import device

# What goes on to the chain under its own name, and is written into the PNG file.
SETTINGS = ("steps", "guidance", "candidates", "prior_steps", "prior_guidance", "upsampler_steps",
            "upsampler2_steps", "size", "tile", "sampler")  # fmt: skip


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=seed, help="the same seed gives the same pictures (default: a random one)"
    )


def add_decoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=count, metavar="N", help="diffusion steps of the decoder")
    parser.add_argument(
        "--guidance", type=scale, metavar="X", help="how closely the decoder follows what it is told"
    )


def add_candidates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--candidates", type=count, metavar="N",
        help="pictures drawn for each one asked for: the one that CLIP finds nearest to the caption is kept",
    )  # fmt: skip


def add_prior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prior-steps", type=count, metavar="N", help="diffusion steps of the prior")
    parser.add_argument("--prior-guidance", type=scale, metavar="X", help="how closely the prior follows it")


def add_upsamplers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--upsampler-steps", type=count, metavar="N", help="those of the upsampler")
    parser.add_argument("--upsampler2-steps", type=count, metavar="N", help="of a second one, to 1024")
    parser.add_argument(
        "--size",
        type=count,
        metavar="PIXELS",
        help="side of a picture, one that the checkpoint makes: 64, 256, 1024 (default: its largest)",
    )
    parser.add_argument(
        "--tile", type=count, metavar="PIXELS", help="upsample in overlapping tiles, to save memory: 512"
    )


def add_sampler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm++"), help="update rule of every stage")


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--batch-size", type=count, metavar="N", help="at most N pictures at a time, to save memory"
    )
    device.add_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the one in the package")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help=f"the grid (default: {default}-SEED.png here)"
    )
    parser.add_argument("--individual", type=Path, metavar="DIR", help="also write every picture on its own")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def start_from_own_noise(args: argparse.Namespace) -> None:
    """The default of --guidance where x_T is found by inversion, as the chain's methods have it; set here so
    that it is written into the file."""
    args.guidance = 1.0 if args.guidance is None else args.guidance


def settings(args: argparse.Namespace) -> dict[str, object]:
    """The settings that a command has; None is the checkpoint's."""
    return {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}


def count(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def count_or_none(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")


def scale(text: str) -> float:
    return _number(text, float, lambda value: math.isfinite(value) and value >= 0, "a number of at least 0")


def share(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def strength(text: str) -> float:
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and up to 1")


def _number(text: str, kind: type, allowed, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
