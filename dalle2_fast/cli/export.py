"""`dalle2-fast export DIR`: the networks of a checkpoint as files for ONNX or OpenVINO."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dalle2_fast.cli.arguments import add_checkpoint, add_json
from dalle2_fast.pipeline.exporting import FORMATS

EXAMPLES = """\
  dalle2-fast export networks --format onnx
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast export`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder for the files and export.json")
    parser.add_argument("--format", choices=FORMATS, required=True, help="which runtime reads the files")
    add_checkpoint(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Export, compare each file with its network, and report; the exit code."""
    from dalle2_fast.pipeline.dalle2 import DALLE2
    from dalle2_fast.pipeline.exporting.export import check_folder, export_networks
    from dalle2_fast.pipeline.exporting.runtimes import find_runtime

    find_runtime(args.format)  # before the weights are read
    check_folder(args.folder)
    pipe = DALLE2.from_pretrained(args.checkpoint, device="cpu", dtype="fp32")
    differences = {}
    for name, difference in export_networks(pipe, args.folder, args.format):
        differences[name] = float(difference)
        if not args.json:
            print(f"{name + ':':<20}largest difference {difference:.2g}", flush=True)
    written = str(args.folder.resolve())
    print(
        json.dumps({"folder": written, "largest_difference": differences})
        if args.json
        else f"{'written:':<20}{written}"
    )
    return 0
