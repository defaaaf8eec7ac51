"""`python -m tests.fuzz --calls 10000`: call every public op with random arguments and count faults."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.fuzz.driver import run
from tests.fuzz.judge import summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=500, help="how many (default 500)")
    parser.add_argument("--first", type=int, default=0, help="number of the first call (default 0)")
    parser.add_argument("--only", type=int, help="one call by its number, with what was drawn")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--json", type=Path, help="write the counts and the faults to this file")
    args = parser.parse_args()
    numbers = range(args.first, args.first + args.calls)
    if args.only is not None:
        from tests.fuzz.calls import draw

        print(draw(args.only))
        numbers = range(args.only, args.only + 1)
    begin = time.monotonic()
    found = run(numbers, args.workers)
    table = summary(found)
    faults = {number: fault for number, (_, _, fault) in found.items() if fault is not None}
    for op, row in table.items():
        print(f"{op:24}{row['valid']:6} valid {row['invalid']:6} invalid {row['faults']:6} faults")
    for number, fault in faults.items():
        print(f"{number}: {found[number][0]}: {fault}")
    print(f"{len(found)} calls, {len(faults)} faults, {time.monotonic() - begin:.0f} s")
    if args.json is not None:
        report = {"calls": len(found), "ops": table, "faults": faults}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
