"""Arguments that several commands share, and the types of numbers that they take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle2_fast.pipeline.compilation import BACKENDS
from dalle2_fast.pipeline.device import DTYPES
from dalle2_fast.pipeline.settings import SAMPLERS, SPACINGS, SamplingSettings

# The headings of `--help`, in their order for a command that has all of them.
IMAGES, DECODER, PRIOR, UPSAMPLER, RUN, OUTPUT = "images", "decoder", "prior", "upsampler", "run", "output"
DECODER_OPTIONS = ("spacing", "guidance_rescale", "dynamic_threshold")
DEVICE_HELP = "auto (default: a GPU if there is one), cpu, cuda, cuda:1, ..."


def section(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The group of options under a heading of `--help`; it is made where there is none of that name."""
    for group in parser._action_groups:
        if group.title == title:
            return group
    return parser.add_argument_group(title)


def add_seed(parser: argparse.ArgumentParser) -> None:
    section(parser, IMAGES).add_argument(
        "-s", "--seed", type=seed, help="the same seed gives the same images (default: a random one)"
    )


def add_num_images(
    parser: argparse.ArgumentParser, what: str = "images (default 4)", default: int | None = 4
) -> None:
    section(parser, IMAGES).add_argument(
        "-n", "--num-images", type=positive_int, default=default, metavar="N", help=what
    )


def add_decoder(parser: argparse.ArgumentParser) -> None:
    add = section(parser, DECODER).add_argument
    add("--steps", type=positive_int, metavar="N", help="diffusion steps of the decoder")
    add(
        "--guidance",
        type=non_negative_float,
        metavar="X",
        help="guidance scale of the decoder: how closely it follows its conditioning (1: no guidance)",
    )
    add_guidance_interval(section(parser, DECODER), "--guidance-interval", "guidance of the decoder")
    add_decoder_details(parser)
    add(
        "--negative",
        dest="negative_prompt",
        type=caption,
        metavar="CAPTION",
        help="a caption that guidance leads away from, in place of no caption",
    )


def add_decoder_details(parser: argparse.ArgumentParser) -> None:
    add = section(parser, DECODER).add_argument
    add("--spacing", choices=SPACINGS, help="how the steps of the decoder are spread over the noise levels")
    add(
        "--guidance-rescale",
        type=fraction,
        metavar="X",
        help="how far guided predictions get back the deviation of unguided ones, 0 to 1",
    )
    add(
        "--dynamic-threshold",
        type=positive_fraction,
        metavar="X",
        help="clip x0 at this quantile of its absolute values, in place of at 1: 0.995",
    )


def add_guidance_interval(parser: argparse._ActionsContainer, name: str, what: str) -> None:
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
    section(parser, DECODER).add_argument(
        "--candidates",
        type=positive_int,
        metavar="N",
        help="images sampled for each one asked for: the one that CLIP finds nearest to the caption is kept",
    )


def add_prior(parser: argparse.ArgumentParser) -> None:
    add = section(parser, PRIOR).add_argument
    add("--prior-steps", type=positive_int, metavar="N", help="diffusion steps of the prior")
    add("--prior-guidance", type=non_negative_float, metavar="X", help="guidance scale of the prior")
    add_guidance_interval(section(parser, PRIOR), "--prior-guidance-interval", "guidance of the prior")
    add(
        "--prior-candidates",
        type=positive_int,
        metavar="N",
        help="embeddings sampled for each image: the one nearest to that of the caption is kept",
    )
    add("--prior-sampler", choices=SAMPLERS, help="update rule of the prior, where it differs from --sampler")


def add_upsamplers(parser: argparse.ArgumentParser) -> None:
    add = section(parser, UPSAMPLER).add_argument
    add("--upsampler-steps", type=positive_int, metavar="N", help="diffusion steps of the upsampler")
    add(
        "--upsampler2-steps",
        type=positive_int,
        metavar="N",
        help="diffusion steps of a second upsampler, to 1024",
    )
    add(
        "--upsampler-sampler",
        choices=SAMPLERS,
        help="update rule of the upsampler, where it differs from --sampler",
    )
    add("--upsampler2-sampler", choices=SAMPLERS, help="the same of a second upsampler")
    add(
        "--tile",
        type=positive_int,
        metavar="PIXELS",
        help="upsample in overlapping tiles of this side, to save memory: 512",
    )
    section(parser, IMAGES).add_argument(
        "--size",
        type=positive_int,
        metavar="PIXELS",
        help="side of an image, one of those that the checkpoint makes",
    )


def add_sampler(parser: argparse.ArgumentParser) -> None:
    section(parser, DECODER).add_argument("--sampler", choices=SAMPLERS, help="update rule of every stage")


def add_checkpoint(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the one in the package")


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """How to run and where to write; `default` is the file name without -SEED.png."""
    run = section(parser, RUN)
    run.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="at most N images at a time, to save memory"
    )
    run.add_argument("--device", default="auto", help=DEVICE_HELP)
    run.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="auto (default): bf16 on a device that is fast in it (a CPU with AMX, a GPU), else fp32",
    )
    run.add_argument(
        "--compile",
        choices=BACKENDS,
        help="run compiled networks: the first job compiles them for minutes, later ones find them on disk",
    )
    run.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="replay sampling steps as CUDA graphs (default: where the device has them)",
    )
    add_checkpoint(run)
    files = section(parser, OUTPUT)
    files.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the grid, as .png, .jpg or .webp (default: a new file outputs/{default}-SEED.png)",
    )
    files.add_argument("--individual", type=Path, metavar="DIR", help="also write each image to a file")
    files.add_argument(
        "--quality", type=_quality, metavar="N", help="of .jpg and .webp, 1 to 100 (default 90)"
    )
    add_json(files)
    files.add_argument("-q", "--quiet", action="store_true", help="no progress bars")


def default_to_no_guidance(args: argparse.Namespace) -> None:
    """The default of --guidance where x_T is found by inversion, as in the methods of the pipeline.

    It is set here so that it is written into the file.
    """
    args.guidance = 1.0 if args.guidance is None else args.guidance


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The size and the SamplingSettings that a command has as options; None is the checkpoint's value."""
    names = (*SamplingSettings.names(), "size")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def given_decoder_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the decoder's sampler that are given and that no checkpoint has a value for."""
    given = {name: getattr(args, name, None) for name in DECODER_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


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


def _quality(text: str) -> int:
    return _number(text, int, lambda value: 1 <= value <= 100, "a whole number from 1 to 100")


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
