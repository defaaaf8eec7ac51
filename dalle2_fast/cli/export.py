"""`dalle2-fast export DIR`: the networks of a checkpoint as files for ONNX or OpenVINO."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli.arguments import add_checkpoint
from dalle2_fast.pipeline.exporting import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast export`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder for the files and export.json")
    parser.add_argument("--format", choices=FORMATS, required=True, help="which runtime reads the files")
    add_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Export, compare each file with its network, and report; the exit code."""
    from dalle2_fast.pipeline.dalle2 import DALLE2
    from dalle2_fast.pipeline.exporting.export import check_folder, export_networks
    from dalle2_fast.pipeline.exporting.runtimes import find_runtime

    find_runtime(args.format)  # before the weights are read
    check_folder(args.folder)
    pipe = DALLE2.from_pretrained(args.checkpoint, device="cpu", dtype="fp32")
    for name, difference in export_networks(pipe, args.folder, args.format):
        print(f"{name + ':':<20}largest difference {difference:.2g}", flush=True)
    print(f"{'written:':<20}{args.folder.resolve()}")
    return 0
