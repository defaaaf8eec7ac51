"""States of many processes: resumed bit for bit, at another number of processes, and with other shards."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder
from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.parallel.processes import ALONE
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import adjust
from dalle2_fast.training.run import train_stage
from dalle2_fast.training.trainer import Trainer
from tests.training.parallel.workers import Launch, run


def train(out: str, parallel: str, broken: int | None, processes) -> str:
    """CLIP with Muon, six steps, a state every second one. broken: the last process raises at this step."""
    preset = adjust(PRESETS["tiny"], ("clip",), batch_size=8, steps=6, save_steps=2)
    optimisation = replace(preset.clip.optimisation, log_steps=1, optimizer="muon")
    preset = replace(preset, clip=replace(preset.clip, optimisation=optimisation))
    whole = Trainer._backward

    def breaking(trainer):
        if trainer.state.step == broken and processes.rank == processes.world_size - 1:
            raise ValueError("a sample is broken")
        return whole(trainer)

    Trainer._backward = breaking
    options = dict(dtype=torch.float32, show_progress=False, processes=processes)
    try:
        return train_stage(
            "clip", preset, Path(out), resume=True, execution=Execution(parallel=parallel), **options
        )
    finally:
        Trainer._backward = whole


def weights(out: Path) -> dict:
    return load_file(out / "clip" / "model.safetensors")


def assert_same(out: Path, expected: dict, *, exactly: bool) -> None:
    tensors = weights(out)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = dict(rtol=0, atol=0) if exactly else dict(rtol=1e-3, atol=3e-4)
        torch.testing.assert_close(tensors[name], value, **tolerance, msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name, made when they are asked for: "whole-ddp", "whole-fsdp", of two processes; and "ddp", "fsdp",
    which end in the fifth step, with the outcomes of their processes."""
    folder, done = tmp_path_factory.mktemp("states"), {}

    def get(name: str) -> tuple[Path, list]:
        if name not in done:
            parallel, broken = name.removeprefix("whole-"), None if name.startswith("whole") else 4
            started = Launch(train, 2, folder / "results", str(folder / name), parallel, broken)
            done[name] = folder / name, started.wait()
        return done[name]

    return get


def copy_of(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    return out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_error_on_one_process_ends_all_and_they_go_on_bit_for_bit(runs, tmp_path, parallel):
    """Catches: processes that wait for one that has failed, and an error that only its own process shows; a
    part of the state that is not saved, buckets of gradients that change after the first step, a state that
    the training changes while it is written."""
    broken, (first, second) = runs(parallel)
    assert first.code == second.code == 1
    assert first.stderr.strip().splitlines()[-1].endswith("TrainingError: process 1: a sample is broken")
    assert second.stderr.strip().splitlines()[-1] == "ValueError: a sample is broken"
    out = copy_of(broken, tmp_path / "out")
    assert StageFolder(out / "clip").checkpoints()[0].name in ("step-000000002", "step-000000004")
    assert run(train, 2, tmp_path / "results", str(out), parallel, None) == ["finished"] * 2
    assert_same(out, weights(runs(f"whole-{parallel}")[0]), exactly=True)
    assert len(StageFolder(out / "clip").checkpoints()) == 2  # --keep
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize("saved, parallel, count", [("ddp", "fsdp", 4), ("fsdp", "ddp", 1)])
def test_another_number_of_processes_goes_on(runs, tmp_path, saved, parallel, count):
    """Catches: a state that only the processes that saved it can read, or moments of another parameter."""
    out = copy_of(runs(saved)[0], tmp_path / "out")
    assert run(train, count, tmp_path / "results", str(out), parallel, None) == ["finished"] * count
    assert_same(out, weights(runs("whole-ddp")[0]), exactly=False)
    # The states of the other form are older, and gone.
    stage = StageFolder(out / "clip")
    assert stage.state_path.exists() == (count == 1) and bool(stage.checkpoints()) == (count > 1)


def test_many_processes_go_on_from_the_state_of_one(runs, tmp_path):
    """Catches: moments of the optimiser that are numbered in another order under fsdp."""
    with pytest.raises(ValueError, match="a sample is broken"):
        train(str(tmp_path / "out"), "ddp", 4, ALONE)
    assert (tmp_path / "out" / "clip" / "state.pt").exists()
    assert run(train, 2, tmp_path / "results", str(tmp_path / "out"), "fsdp", None) == ["finished"] * 2
    assert_same(tmp_path / "out", weights(runs("whole-ddp")[0]), exactly=False)


def test_a_damaged_state_is_named(runs, tmp_path):
    """Catches: a traceback of torch for half of a file, and a flipped bit that is trained on."""
    out = copy_of(runs("ddp")[0], tmp_path / "out")
    newest = StageFolder(out / "clip").checkpoints()[0]
    largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[:100], flipped):
        largest.write_bytes(content)
        with pytest.raises(TrainingError, match=f"{newest}: damaged training state .*; delete"):
            train(str(out), "ddp", None, ALONE)
