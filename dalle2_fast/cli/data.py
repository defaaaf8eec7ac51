"""`dalle2-fast data check DATA`: what is broken; `dalle2-fast data pack DATA OUT`: write shards."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

ACTIONS = ("check", "pack")
# The options that only one of the actions has, with the attributes that hold them.
ONLY = {
    "check": {"--contact-sheet": "contact_sheet", "--json": "json", "--allow-pipe": "allow_pipe",
              "--threads": "threads"},
    "pack": {"OUT": "out", "--shard-size": "shard_size", "--verify": "verify"},
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast data`."""
    add = parser.add_argument
    add(
        "action",
        choices=ACTIONS,
        help="check: read all samples, say what there is and what is broken (exit code 1 if something is); "
        "pack: write WebDataset shards with the names of img2dataset",
    )
    add(
        "data",
        metavar="DATA",
        help="tar shards (a path or URL, data-{000..099}.tar, a folder of them), a folder of pictures with "
        "captions, a CSV or Parquet list, or a saved Hugging Face dataset: docs/data.md",
    )
    add("out", nargs="?", type=Path, metavar="OUT", help="pack: folder of the shards, begun or new")
    add("--contact-sheet", type=Path, metavar="FILE.png", help="check: draw 64 pictures with their captions")
    add("--json", action="store_true", default=None, help="check: print JSON, which names everything broken")
    add("--allow-pipe", action="store_true", default=None, help="check: run the commands of pipe: shards")
    add("--threads", type=int, help="check: threads that decode pictures (default 4)")
    add("--shard-size", type=int, metavar="N", help="pack: samples in a shard (default 10000)")
    add("--verify", action="store_true", default=None, help="pack: read the shards again and compare")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Check or pack; the exit code."""
    for action, options in ONLY.items():
        for name, attribute in options.items():
            if action != args.action and getattr(args, attribute) is not None:
                raise ValueError(f"{name}: is for data {action}, got data {args.action}")
    return _check(args) if args.action == "check" else _pack(args)


def _check(args: argparse.Namespace) -> int:
    from dalle2_fast.data.check import check

    threads = 4 if args.threads is None else args.threads
    if threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {threads}")
    sheet_path = args.contact_sheet
    if sheet_path is not None and not sheet_path.parent.is_dir():
        raise ValueError(f"--contact-sheet: {sheet_path.parent} is no folder")
    report, sheet = check(
        args.data,
        allow_pipe=bool(args.allow_pipe),
        contact_sheet=sheet_path is not None,
        threads=threads,
        progress=_bar("checking", "sample", args.quiet),
    )
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print("\n".join(report.lines()))
    if sheet is not None:
        sheet.save(sheet_path)
        print(f"contact sheet: {sheet_path}", file=sys.stderr)
    elif sheet_path is not None:
        print("no contact sheet: no picture can be used", file=sys.stderr)
    return int(bool(report.broken) or not report.usable)


def _pack(args: argparse.Namespace) -> int:
    from dalle2_fast.data.pack import pack, verify

    if args.out is None:
        raise ValueError("OUT: expected the folder of the shards, got none")
    size = 10_000 if args.shard_size is None else args.shard_size
    if size < 1:
        raise ValueError(f"--shard-size: expected at least 1, got {size}")
    packed = pack(args.data, args.out, shard_size=size, progress=_bar("packing", "shard", args.quiet))
    kept = len(packed.shards) - packed.written
    print(
        f"shards written to {args.out}: {packed.written}, with {packed.samples:,} samples"
        f"{f', {kept} were there' if kept else ''}; left out: {len(packed.left_out)}"
    )
    for complaint in packed.left_out[:10]:
        print(f"  {complaint.reason}: {complaint.shard}, {complaint.where}")
    if len(packed.left_out) > 10:
        print("  ... (data check names them)")
    if args.verify:
        count = verify(args.data, packed, progress=_bar("verifying", "shard", args.quiet))
        print(f"verified: {count:,} samples equal those of the data")
    return 0


def _bar(text: str, unit: str, quiet: bool) -> Callable[[Iterable], Iterable]:
    from tqdm import tqdm

    return partial(tqdm, desc=text, unit=unit, disable=quiet, leave=False)
