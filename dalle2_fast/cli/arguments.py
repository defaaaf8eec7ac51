"""Arguments that several commands share, and the types of numbers that they take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle2_fast.pipeline.compilation import BACKENDS
from dalle2_fast.pipeline.device import DTYPES
from dalle2_fast.pipeline.settings import SAMPLERS, SamplingSettings

DEVICE_HELP = "auto (default: a GPU if there is one), cpu, cuda, cuda:1, ..."


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=seed, help="the same seed gives the same images (default: a random one)"
    )


def add_num_images(parser: argparse.ArgumentParser, what: str = "images") -> None:
    parser.add_argument("--num-images", type=positive_int, default=4, metavar="N", help=f"{what} (default 4)")


def add_decoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=positive_int, metavar="N", help="diffusion steps of the decoder")
    parser.add_argument(
        "--guidance",
        type=non_negative_float,
        metavar="X",
        help="guidance scale of the decoder: how closely it follows its conditioning (1: no guidance)",
    )
    add_guidance_interval(parser, "--guidance-interval", "guidance of the decoder")


def add_guidance_interval(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    parser.add_argument(
        name,
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"{what} only in the steps whose log-SNR is at least LOW and below HIGH; sampling begins at a "
        "negative one, pure noise, and -100 100 is all steps",
    )


def add_decoder_caption(parser: argparse.ArgumentParser, of: str = "image alone decides") -> None:
    parser.add_argument("--caption", type=caption, help=f"a caption for the decoder (default: the {of})")


def add_candidates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--candidates",
        type=positive_int,
        metavar="N",
        help="images sampled for each one asked for: the one that CLIP finds nearest to the caption is kept",
    )


def add_prior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prior-steps", type=positive_int, metavar="N", help="diffusion steps of the prior")
    parser.add_argument(
        "--prior-guidance", type=non_negative_float, metavar="X", help="guidance scale of the prior"
    )
    add_guidance_interval(parser, "--prior-guidance-interval", "guidance of the prior")


def add_upsamplers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--upsampler-steps", type=positive_int, metavar="N", help="diffusion steps of the upsampler"
    )
    parser.add_argument(
        "--upsampler2-steps",
        type=positive_int,
        metavar="N",
        help="diffusion steps of a second upsampler, to 1024",
    )
    parser.add_argument(
        "--size",
        type=positive_int,
        metavar="PIXELS",
        help="side of an image, one that the checkpoint makes: 64, 256, 1024 (default: its largest)",
    )
    parser.add_argument(
        "--tile",
        type=positive_int,
        metavar="PIXELS",
        help="upsample in overlapping tiles of this side, to save memory: 512",
    )


def add_sampler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampler", choices=SAMPLERS, help="update rule of every stage")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the one in the package")


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """How to run and where to write; `default` is the file name without -SEED.png."""
    parser.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="at most N images at a time, to save memory"
    )
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="auto (default): bf16 on a device that is fast in it (a CPU with AMX, a GPU), else fp32",
    )
    parser.add_argument(
        "--compile",
        choices=BACKENDS,
        help="run compiled networks: the first job compiles them for minutes, later ones find them on disk",
    )
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="replay sampling steps as CUDA graphs (default: where the device has them)",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help=f"the grid (default: {default}-SEED.png here)"
    )
    parser.add_argument("--individual", type=Path, metavar="DIR", help="also write each image to a file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def default_to_no_guidance(args: argparse.Namespace) -> None:
    """The default of --guidance where x_T is found by inversion, as in the methods of the pipeline.

    It is set here so that it is written into the file.
    """
    args.guidance = 1.0 if args.guidance is None else args.guidance


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The size and the SamplingSettings that a command has as options; None is the checkpoint's value."""
    names = (*SamplingSettings.names(), "size")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def caption(text: str) -> str:
    """A caption, which is written into the PNG file as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes that are no text reach Python as lone surrogates
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, got {text!r}") from None
    return text


def positive_int(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")


def non_negative_float(text: str) -> float:
    return _number(text, float, lambda value: math.isfinite(value) and value >= 0, "a number of at least 0")


def fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def positive_fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and up to 1")


def _number(text: str, kind: type, allowed: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
