"""`python -m tests.hostile`: load every damaged file and print what happened."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tests.hostile.cases import cases, judge, load
from tests.hostile.checkpoints import Originals


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--verbose", action="store_true", help="one line for every case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts, faults = Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        originals = Originals(Path(folder))
        for name in cases():
            if args.only not in name:
                continue
            outcome = load(name, originals)
            fault = judge(name, outcome)
            counts[outcome.kind] += 1
            faults += fault is not None
            if fault or args.verbose:
                said = outcome.message.strip()[-300:]
                spent = f"{outcome.seconds:4.1f} s, {outcome.megabytes:3d} MB"
                print(f"{spent}: {name}: {fault or outcome.kind}: {said}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()) + f"; {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
