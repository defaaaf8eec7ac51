"""Kill a training at drawn instants, resume it, and compare it with an uninterrupted one.

    python -m tests.training.kill --kills 50

Each instant is a training of its own: all stages of `tiny`, six steps each with a state every second step,
and the pipeline. It ends at one of these: SIGKILL at a drawn time; the process exits just before, just after
or in the middle of a drawn call of os.replace, os.fsync or Path.write_bytes or of a write to the log; or such
a call fails because the disk is full or read-only. (Permissions do not bind root, so the error is simulated.)
Then the run is resumed by a command that does not name the data. It is lost if that fails, if a weight, a
logged loss or an image differs in one bit, or if a temporary file remains.

The trainings are forks of one process that has imported torch and computed nothing: each takes seconds.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import hashlib
import io
import json
import os
import random
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import STAGES
from dalle2_fast.training.run import export_pipeline, train_stages

KILLED, REFUSED, CRASHED = 137, 2, 3
CALLS = ("replace", "fsync", "write_bytes", "log")
ERRORS = {"disk full": errno.ENOSPC, "read-only": errno.EROFS, "no permission": errno.EACCES}


def short_preset(stages: tuple[str, ...]):
    """`tiny` with six steps and a state every second step."""
    preset = PRESETS["tiny"]
    for name in stages:
        options = replace(preset.recipe(name).optimisation, steps=6, save_steps=2)
        preset = replace(preset, **{name: replace(preset.recipe(name), optimisation=options)})
    return preset


def train(out: Path, stages: tuple[str, ...], shards: str | None) -> None:
    """One command: all stages, resumed where they have begun, and the pipeline."""
    torch.set_num_threads(1)
    preset = short_preset(stages)
    options = dict(resume=True, dtype=torch.float32, show_progress=False)
    train_stages(stages, preset, out, shards=shards, **options)
    if stages == STAGES:
        export_pipeline(preset, out, dtype=torch.float32)


class Fault:
    """Counts the calls that write, and kills the process or raises at one of them.

    Args:
        call: one of CALLS.
        number: of the call, from 0. -1: never.
        effect: "before", "middle", "after": the process exits; or a key of ERRORS.
    """

    def __init__(self, call: str = "", number: int = -1, effect: str = "") -> None:
        self.call, self.number, self.effect = call, number, effect
        self.counts: Counter[str] = Counter()

    def wrap(self, call: str, function, half):
        """`function`, counted as `call`. half(*arguments) does a part of it."""

        def wrapped(*arguments, **options):
            is_here = call == self.call and self.counts[call] == self.number
            self.counts[call] += 1
            if not is_here:
                return function(*arguments, **options)
            if self.effect in ("middle", "disk full"):
                half(*arguments)
            if self.effect in ERRORS:
                number = ERRORS[self.effect]
                raise OSError(number, os.strerror(number))
            if self.effect == "after":
                function(*arguments, **options)
            os._exit(KILLED)

        return wrapped

    def install(self) -> None:
        nothing = lambda *arguments: None  # noqa: E731
        os.replace = self.wrap("replace", os.replace, nothing)
        os.fsync = self.wrap("fsync", os.fsync, nothing)
        write, plain_open = Path.write_bytes, builtins.open
        half = lambda path, data: write(path, bytes(data)[: len(data) // 2])  # noqa: E731
        Path.write_bytes = self.wrap("write_bytes", write, half)

        def open_and_watch(file, mode="r", *arguments, **options):
            opened = plain_open(file, mode, *arguments, **options)
            if mode == "a":
                whole = opened.write

                def begin(text):
                    whole(text[: len(text) // 2])
                    opened.flush()

                def write_all(text):
                    whole(text)
                    opened.flush()

                opened.write = self.wrap("log", write_all, begin)
            return opened

        builtins.open = open_and_watch


def in_child(work, kill_after: float | None = None) -> tuple[int, str]:
    """Run `work` in a fork: its exit code (137 if it was killed) and the last line that it wrote."""
    with tempfile.TemporaryFile("w+") as output:
        if (child := os.fork()) == 0:
            code = CRASHED
            try:
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                    try:
                        work()
                        code = 0
                    except TrainingError as error:
                        print(error)
                        code = REFUSED
                    except BaseException:
                        traceback.print_exc()
                    output.flush()
            finally:
                os._exit(code)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        lines = output.read().splitlines()
        code = KILLED if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return code, lines[-1] if lines else ""


def fingerprint(out: Path) -> dict[str, str]:
    """What must be equal bit for bit: weights of stages and pipeline, logged losses, images."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors":
            tensors = sorted(load_file(path).items())
            content = b"".join(key.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                               for key, value in tensors)  # fmt: skip
        elif path.name == "log.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            kept = [{key: row[key] for key in row if key not in ("seconds", "images_per_s")} for row in rows]
            content = json.dumps(kept).encode()
        elif path.suffix == ".png":
            content = path.read_bytes()
        elif path.name.endswith(".partial") or path.name == ".lock":
            content = b"left behind"
        else:
            continue
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def write_shard(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for index in range(60):
            png = io.BytesIO()
            Image.new("RGB", (20, 16), (4 * index, 90, 255 - 4 * index)).save(png, format="PNG")
            for ending, data in (("png", png.getvalue()), ("txt", f"image number {index}".encode())):
                entry = tarfile.TarInfo(f"{index:04d}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def drawn_fault(draw: random.Random, counts: dict[str, int]) -> Fault:
    """A fault at one of the calls that an uninterrupted training makes."""
    call = draw.choice([name for name in CALLS if counts.get(name)])
    effects = ["before", "middle", "after", *ERRORS] if call in ("write_bytes", "log") else [
        "before", "after", *ERRORS]  # fmt: skip
    return Fault(call, draw.randrange(counts[call]), draw.choice(effects))


def run(kills: int, seed: int, stages: tuple[str, ...], on_shards: bool, report=print) -> int:
    """Kill and resume `kills` trainings.

    Args:
        kills: number of instants.
        seed: of the instants.
        stages: that are trained.
        on_shards: train on shards instead of scenes.
        report: called with each line of the table.

    Returns:
        The number of runs that were lost.
    """
    draw, lost, endings = random.Random(seed), 0, Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shards = str(write_shard(folder / "data.tar")) if on_shards else None

        def counted():
            fault = Fault()
            fault.install()
            train(folder / "whole", stages, shards)
            (folder / "counts.json").write_text(json.dumps(fault.counts))

        begin = time.monotonic()
        code, last = in_child(counted)
        duration = time.monotonic() - begin
        if code != 0:
            raise RuntimeError(f"the uninterrupted training ended with {code}: {last}")
        whole = fingerprint(folder / "whole")
        counts = json.loads((folder / "counts.json").read_text())
        report(f"uninterrupted: {duration:.1f} s, calls {counts}, {len(whole)} files compared")
        for index in range(kills):
            out = folder / str(index)
            if index % 2:
                when = draw.uniform(0.0, duration)
                what = f"SIGKILL after {when:.2f} s"
                code, last = in_child(lambda out=out: train(out, stages, shards), kill_after=when)
            else:
                fault = drawn_fault(draw, counts)
                what = f"{fault.effect} at {fault.call} {fault.number}"

                def faulty(out=out, fault=fault):
                    fault.install()
                    train(out, stages, shards)

                code, last = in_child(faulty)
            ending = {0: "finished", KILLED: "killed", REFUSED: "one line"}.get(code, "crashed")
            endings[ending] += 1
            again, text = in_child(lambda out=out: train(out, stages, named_shards(out, shards)))
            result = fingerprint(out)
            different = sorted(name for name in whole | result if whole.get(name) != result.get(name))
            is_lost = code == CRASHED or again != 0 or bool(different)
            lost += is_lost
            verdict = "resumed, identical"
            if is_lost:
                verdict = f"LOST: {last} | {text} | {', '.join(different[:4])}"
            report(f"{index:3d}  {what:36s} {ending:9s} {verdict}")
        report(f"{kills} instants: {dict(endings)}; {kills - lost} resumed bit for bit, {lost} lost")
    return lost


def named_shards(out: Path, shards: str | None) -> str | None:
    """The shards that the second command names: none, unless the first one was killed before its record."""
    return None if (out / "run.json").exists() else shards


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--shards", action="store_true", help="train on shards instead of rendered scenes")
    options = parser.parse_args(argv)
    report = lambda line: print(line, flush=True)  # noqa: E731
    return int(run(options.kills, options.seed, tuple(options.stages), options.shards, report) > 0)


if __name__ == "__main__":
    sys.exit(main())
