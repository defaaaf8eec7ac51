"""Kill one of several training processes at drawn instants, restart all, and compare with a whole training.

    python -m tests.training.parallel.kill --kills 20

Each instant is a training of its own: stages of `tiny`, six steps each with a state every second step.
SIGKILL reaches a drawn process at a drawn time after they met. The others have to end by themselves. Then all
are started again with --resume. The run is lost if that fails, if a weight, a logged loss or an image differs
in one bit, or if a temporary file remains.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import adjust
from dalle2_fast.training.run import train_stages
from tests.training.kill import fingerprint
from tests.training.parallel.workers import Launch

MET = "met"  # a file: all processes have met


def train(out: str, stages: tuple[str, ...], parallel: str, processes) -> str:
    """One command on every process: the stages, resumed where they have begun."""
    preset = adjust(PRESETS["tiny"], stages, batch_size=8, steps=6, save_steps=2)
    for name in stages:
        options = replace(preset.recipe(name).optimisation, log_steps=2)
        preset = replace(preset, **{name: replace(preset.recipe(name), optimisation=options)})
    if processes.is_first:
        Path(f"{out}.{MET}").touch()
    return train_stages(
        stages, preset, Path(out), resume=True, dtype=torch.float32, show_progress=False,
        processes=processes, execution=Execution(parallel=parallel),
    )[1]  # fmt: skip


def run(
    kills: int, seed: int, world_size: int, stages: tuple[str, ...], parallel: str, report=print
) -> int:
    """Kill and restart `kills` trainings.

    Args:
        kills: number of instants.
        seed: of the instants and of the processes.
        world_size: number of processes.
        stages: that are trained.
        parallel: "ddp" or "fsdp".
        report: called with each line of the table.

    Returns:
        The number of runs that were lost.
    """
    draw, lost = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def launch(out: Path) -> Launch:
            out.with_name(f"{out.name}.{MET}").unlink(missing_ok=True)
            return Launch(train, world_size, folder / "results", str(out), stages, parallel)

        def meet(out: Path) -> float:
            end = time.monotonic() + 60
            while not out.with_name(f"{out.name}.{MET}").exists() and time.monotonic() < end:
                time.sleep(0.01)
            return time.monotonic()

        whole = launch(folder / "whole")
        begin = meet(folder / "whole")
        outcomes = whole.wait()
        length = time.monotonic() - begin
        assert [outcome.value for outcome in outcomes] == ["finished"] * world_size, outcomes[0].stderr
        expected = fingerprint(folder / "whole")

        for number in range(kills):
            rank, after, out = draw.randrange(world_size), draw.uniform(0, length), folder / str(number)
            killed = launch(out)
            meet(out)
            time.sleep(after)
            if killed.processes[rank].is_alive():
                os.kill(killed.processes[rank].pid, signal.SIGKILL)
            codes = [outcome.code for outcome in killed.wait(limit=60)]
            step = newest_step(out)
            restarted = launch(out).wait()
            ended = [outcome.value for outcome in restarted] == ["finished"] * world_size
            same = ended and fingerprint(out) == expected
            lost += not same
            what = "same bits" if same else "LOST " + next((o.stderr[-300:] for o in restarted if o.code), "")
            report(f"{number:3d}  rank {rank} after {after:5.2f} s, codes {codes}, from {step}: {what}")
    report(f"{kills - lost} of {kills} runs equal the whole one bit for bit")
    return lost


def newest_step(out: Path) -> str:
    """The newest state of the run, for the table."""
    found = [path for path in out.glob("*/checkpoints/step-*") if path.suffix != ".partial"]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return "the start" if newest is None else f"{newest.parts[-3]} {newest.name}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--stages", nargs="+", default=["clip", "decoder"])
    args = parser.parse_args(argv)
    return int(run(args.kills, args.seed, args.processes, tuple(args.stages), args.parallel) > 0)


if __name__ == "__main__":
    sys.exit(main())
