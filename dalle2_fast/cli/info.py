"""`dalle2-fast info`: versions, backends and the checkpoint, for a reader or a bug report."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast import __version__
from dalle2_fast.cli.arguments import add_checkpoint
from dalle2_fast.pipeline.device import choose_device, choose_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast info`."""
    add_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code."""
    from dalle2_fast.checkpoints import embedded_path
    from dalle2_fast.ops._build_info import build_info

    for key, value in (build_info() | {"dalle2_fast": __version__}).items():
        _print(key.replace("_", " "), _words(value))
    device = choose_device("auto")
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    _print("default", f"{device}, {dtype}")
    path = args.checkpoint or embedded_path()
    try:
        _print("checkpoint", _describe_checkpoint(path))
    except (ValueError, FileNotFoundError) as error:
        if args.checkpoint is not None:
            raise
        _print("checkpoint", f"none ({error})")  # the rest of the report is still useful
    return 0


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


def _print(key: str, value: str) -> None:
    print(f"{key + ':':<18}{value}")
