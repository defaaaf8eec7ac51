"""`dalle2-fast info`: versions, backends and the checkpoint, for a reader or a bug report."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle2_fast import __version__
from dalle2_fast.cli.arguments import DEVICE_HELP, add_checkpoint, add_json
from dalle2_fast.pipeline.device import DTYPES, choose_device, choose_dtype

if TYPE_CHECKING:
    import torch

    from dalle2_fast.pipeline.context import Generation
    from dalle2_fast.pipeline.dalle2 import DALLE2


EXAMPLES = """\
  dalle2-fast info
  dalle2-fast info --check            # draws one picture and says what is slow here, and why
  dalle2-fast info --json | jq .fused_ops
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast info`."""
    add_checkpoint(parser)
    parser.add_argument(
        "--check", action="store_true", help="draw one picture, and say what is slow on this machine and why"
    )
    parser.add_argument("--device", default="auto", help=f"of --check: {DEVICE_HELP}")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="of --check")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code."""
    from dalle2_fast.checkpoints import embedded_path
    from dalle2_fast.ops._build_info import build_info

    if not args.check and (args.device, args.dtype) != ("auto", "auto"):
        raise ValueError("--device, --dtype: expected together with --check")
    facts: dict[str, object] = build_info() | {"dalle2_fast": __version__}
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    facts["default"] = f"{device}, {str(dtype).removeprefix('torch.')}"
    path = args.checkpoint or embedded_path()
    try:
        facts["checkpoint"] = _describe_checkpoint(path)
    except (ValueError, FileNotFoundError) as error:
        if args.checkpoint is not None or args.check:
            raise
        facts["checkpoint"] = f"none ({error})"  # the rest of the report is still useful
    if not args.json:
        _print_all(facts)
    if args.check:
        checked = _check(path, device, dtype, facts)
        facts |= checked
        if not args.json:
            seconds = checked["seconds"]
            _print("picture", f"drawn in {seconds['in all']:.2f} s ({_seconds(seconds)})")
            for reason in checked["slow_because"]:
                _print("slow", reason)
            if not checked["slow_because"]:
                _print("slow", "nothing that is known would make it faster")
    if args.json:
        print(json.dumps(facts))
    return 0


def _check(
    path: Path, device: torch.device, dtype: torch.dtype, info: Mapping[str, object]
) -> dict[str, Any]:
    """Draw a picture; its seconds, and why they are not fewer. A failure is the error of the command."""
    from dalle2_fast.cli.checks.machine import slow_because
    from dalle2_fast.ops._build_info import cpu_has_bfloat16_units
    from dalle2_fast.pipeline.dalle2 import DALLE2

    pipe = DALLE2.from_pretrained(path, device=device, dtype=dtype)
    caption = " ".join(getattr(pipe.tokenizer, "words", ("a", "picture"))[:1])
    began = time.perf_counter()
    made = pipe.generate(caption, 1, seed=0) if pipe.prior is not None else _varied(pipe)
    seconds = {**made.seconds, "in all": time.perf_counter() - began}
    reasons = slow_because(device, dtype, info, fast_bfloat16=cpu_has_bfloat16_units())
    return {"seconds": seconds, "slow_because": reasons}


def _varied(pipe: DALLE2) -> Generation:
    """A picture of a pipeline without prior, from a grey image."""
    import torch

    return pipe.variations(torch.full((3, 64, 64), 0.5), 1, seed=0)


def _seconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {spent:.2f}" for name, spent in seconds.items() if name != "in all")


def _describe_checkpoint(path: Path) -> str:
    from dalle2_fast.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(path)
    tensors = dict(checkpoint.tensors)
    if checkpoint.clip is not None:
        tensors |= {f"clip.{name}": tensor for name, tensor in checkpoint.clip.tensors.items()}
    version, metadata = checkpoint.config.get("format_version"), checkpoint.config.get("metadata") or {}
    layout = f"{metadata.get('layout')}'s layout" if version is None else f"format {version}"
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + tensor.numel()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    sizes = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    return f"{checkpoint.path} ({layout}, {', '.join(dtypes)}; numbers stored: {sizes})"


def _words(value: object) -> str:
    """A value of the report as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        known = {key.replace("_", " "): part for key, part in value.items() if part is not None}
        return "; ".join(f"{key} {_words(part)}" for key, part in known.items()) or "none"
    return "none" if value is None else str(value)


def _print_all(facts: Mapping[str, object]) -> None:
    for key, value in facts.items():
        _print(key.replace("_", " "), _words(value))


def _print(key: str, value: str) -> None:
    print(f"{key + ':':<18}{value}")
