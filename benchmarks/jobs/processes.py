"""Images per second of one and of two processes over gloo, and how long training stands still for a state.

    python -m benchmarks.jobs.processes [--rounds 3] [--steps 20]

Every run is a set of new processes on this machine, each with one thread, that trains a stage of scenes-cpu
on rendered scenes; one process and many take turns. A rate is that of the steps after the first three. The
state is that of the decoder: `stands_still_s` until the training may go on, `complete_s` until it is on the
disk, medians of three. The result is benchmarks/results/processes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.timing.provenance import ROOT, machine, save, versions
from dalle2_fast.training.folder import StageFolder
from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.parallel.processes import Processes, joined
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import adjust
from dalle2_fast.training.stages.registry import make_stage
from dalle2_fast.training.trainer import Trainer
from dalle2_fast.training.weights import save_weights

CASES = {"one process": (1, "ddp"), "2 processes, ddp": (2, "ddp"), "2 processes, fsdp": (2, "fsdp")}
STAGES = ("clip", "decoder")
WARM_UP = 3


def trainer_of(stage: str, out: Path, parallel: str, processes: Processes) -> Trainer:
    """A trainer of a stage of scenes-cpu; the decoder learns from a CLIP with initial weights."""
    preset = adjust(PRESETS["scenes-cpu"], (stage,), steps=10**6)
    options = dict(out=out, seed=0, device=torch.device("cpu"), processes=processes)
    if stage != "clip" and processes.is_first:
        clip = make_stage("clip", preset, **options | {"processes": Processes()})
        (out / "clip").mkdir(parents=True)
        save_weights(out / "clip" / "model.safetensors", clip.config, clip.model.state_dict())
    processes.from_first(None)
    made = make_stage(stage, preset, **options)
    made.fit()
    folder = StageFolder(out / stage)
    if processes.is_first:
        folder.prepare()
    processes.from_first(None)
    return Trainer(
        made, preset.recipe(stage).optimisation, folder, show_progress=False, processes=processes,
        execution=Execution(parallel=parallel),
    )  # fmt: skip


def measure(stage: str, parallel: str, steps: int, out: Path) -> dict:
    """One process of a run; the first one returns its numbers."""
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as processes:
        trainer = trainer_of(stage, out, parallel, processes)
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                processes.from_first(None)
                begin = time.monotonic()
            processes.tick([])  # as in every step of a training
            trainer.step(1e-4)
        processes.from_first(None)
        rate = steps / (time.monotonic() - begin)
        found = {"images_per_s": round(rate * trainer.options.batch_size, 1)}
        if stage == "decoder":
            still, complete = [], []
            for _ in range(3):
                processes.from_first(None)
                begin = time.monotonic()
                trainer.save(wait=False)
                still.append(time.monotonic() - begin)
                trainer.checkpoints.finish()
                complete.append(time.monotonic() - begin)
            files = [path for path in trainer.folder.newest_path().rglob("*") if path.is_file()]
            files = files or [trainer.folder.newest_path()]
            found |= {
                "state_bytes": sum(path.stat().st_size for path in files),
                "stands_still_s": statistics.median(still),
                "complete_s": statistics.median(complete),
            }
        return found


def launch(stage: str, case: str, steps: int) -> dict:
    """The numbers of a run, by its first process."""
    count, parallel = CASES[case]
    with socket.socket() as free, tempfile.TemporaryDirectory() as out:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        address |= {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-m", "benchmarks.jobs.processes"]
        started = [
            subprocess.Popen(
                [*program, "--one", stage, parallel, str(steps), out], cwd=ROOT, stdout=subprocess.PIPE,
                text=True, env=os.environ | address | {"RANK": str(rank)},
            )
            for rank in range(count)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise RuntimeError(f"{stage}, {case}: a process failed")
        return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.processes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--one", nargs=4, help="one process of a run; prints its numbers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--note", default="", help="kept in the file, e.g. other load on the machine")
    arguments = parser.parse_args()
    if arguments.one:
        stage, parallel, steps, out = arguments.one
        print(json.dumps(measure(stage, parallel, int(steps), Path(out))))
        return
    about = {"machine": machine(), "versions": versions(), "note": arguments.note}
    runs: dict[tuple[str, str], list[dict]] = {(stage, case): [] for stage in STAGES for case in CASES}
    for _ in range(arguments.rounds):
        for (stage, case), found in runs.items():
            found.append(launch(stage, case, arguments.steps))
    rows = [
        {"stage": stage, "case": case}
        | {name: round(statistics.median(run[name] for run in found), 4) for name in found[0]}
        for (stage, case), found in runs.items()
    ]
    print(save("processes", {**about, "settings": {"rounds": arguments.rounds, "steps": arguments.steps},
                             "rows": rows}))  # fmt: skip
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
