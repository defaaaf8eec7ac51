"""`dalle2-fast generate CAPTION`: a PNG grid, and where the time went."""

from __future__ import annotations

import argparse
import json
import math
import secrets
import sys
import time
from pathlib import Path

from dalle2_fast import __version__, cli_device, cli_picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("caption", help='what to draw, e.g. "a large red circle above a small blue square"')
    parser.add_argument("--num-images", type=_count, default=4, metavar="N", help="pictures (default 4)")
    parser.add_argument(
        "--seed", type=_seed, help="the same seed gives the same pictures (default: a random one)"
    )
    parser.add_argument("--steps", type=_count, metavar="N", help="diffusion steps of the decoder")
    parser.add_argument(
        "--guidance", type=_scale, metavar="X", help="how closely the decoder follows the caption"
    )
    parser.add_argument("--prior-steps", type=_count, metavar="N", help="diffusion steps of the prior")
    parser.add_argument("--prior-guidance", type=_scale, metavar="X", help="how closely the prior follows it")
    parser.add_argument("--upsampler-steps", type=_count, metavar="N", help="those of the upsampler")
    parser.add_argument("--upsampler2-steps", type=_count, metavar="N", help="of a second one, to 1024")
    parser.add_argument(
        "--size",
        type=_count,
        metavar="PIXELS",
        help="side of a picture, one that the checkpoint makes: 64, 256, 1024 (default: its largest)",
    )
    parser.add_argument(
        "--tile", type=_count, metavar="PIXELS", help="upsample in overlapping tiles, to save memory: 512"
    )
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm++"), help="update rule of every stage")
    parser.add_argument(
        "--batch-size", type=_count, metavar="N", help="at most N pictures at a time, to save memory"
    )
    cli_device.add_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the one in the package")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help="the grid (default: CAPTION-SEED.png here)"
    )
    parser.add_argument("--individual", type=Path, metavar="DIR", help="also write every picture on its own")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    if not args.caption.strip():
        raise ValueError("caption: expected words, got an empty caption")
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    output = args.output or Path(cli_picture.file_name(args.caption, seed))
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output: expected a name that ends in .png, got {str(output)!r}")
    if output.is_dir():
        raise IsADirectoryError(f"--output: {output} is a folder, expected a file name")
    cli_picture.check_writable(output.parent, "--output")
    if args.individual is not None:
        cli_picture.check_writable(args.individual, "--individual")

    from dalle2_fast import _backend

    device = cli_device.choose_device(args.device)
    dtype = cli_device.choose_dtype(args.dtype, device)
    if args.dtype in ("bf16", "fp16") and device.type == "cpu" and not _backend.cpu_has_bfloat16():
        print(f"note: this CPU computes {args.dtype} in software; fp32 is faster", file=sys.stderr)
    from dalle2_fast.models.dalle2 import DALLE2, to_pil

    pipe = DALLE2.from_pretrained(args.checkpoint, device=device, dtype=dtype)
    start_up = time.perf_counter() - began
    made = pipe.generate(
        args.caption,
        args.num_images,
        seed=seed,
        steps=args.steps,
        guidance=args.guidance,
        prior_steps=args.prior_steps,
        prior_guidance=args.prior_guidance,
        upsampler_steps=args.upsampler_steps,
        upsampler2_steps=args.upsampler2_steps,
        size=args.size,
        tile=args.tile,
        sampler=args.sampler,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )

    pictures = to_pil(made.images)
    settings = {**pipe.sampling, **_given(args)} | {"device": device.type, "dtype": _name(dtype)}
    texts = {"caption": args.caption, "seed": seed, "settings": json.dumps(settings)}
    texts["Software"] = f"dalle2_fast {__version__}"
    output.parent.mkdir(parents=True, exist_ok=True)
    cli_picture.save_png(cli_picture.grid(pictures), output, texts | {"num_images": len(pictures)})
    if args.individual is not None:
        args.individual.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures):
            cli_picture.save_png(picture, args.individual / f"{index:03d}.png", texts | {"index": index})

    seconds = {"start-up": start_up, **made.seconds}
    width, height = pictures[0].size
    lines = {"image": f"{output.resolve()} ({len(pictures)} of {width} x {height})"}
    if args.individual is not None:
        lines["individual"] = str(args.individual.resolve())
    lines |= {
        "seed": seed,
        "device": f"{_device_name(device)}, {_name(dtype)}",
        "backend": _backend_name(),
        "seconds": ", ".join(f"{name} {spent:.2f}" for name, spent in seconds.items())
        + f", in all {sum(seconds.values()):.2f}",
    }
    for key, value in lines.items():
        print(f"{key + ':':<12}{value}")
    return 0


def _given(args: argparse.Namespace) -> dict[str, object]:
    names = ("steps", "guidance", "prior_steps", "prior_guidance", "upsampler_steps", "upsampler2_steps",
             "size", "tile", "sampler")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def _backend_name() -> str:
    from dalle2_fast._backend import KERNELS, build_info

    fused = [name for name in build_info()["fused_ops"] if name in KERNELS]  # the losses draw nothing
    return f"fused ({', '.join(fused)}), else reference" if fused else "reference (plain PyTorch)"


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def _seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")


def _scale(text: str) -> float:
    return _number(text, float, lambda value: math.isfinite(value) and value >= 0, "a number of at least 0")


def _number(text: str, kind: type, allowed, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
