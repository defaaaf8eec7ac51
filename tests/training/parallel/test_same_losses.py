"""Any number of processes, micro-batches and shards trains the same model: losses and weights to rounding."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import adjust, choose_prior
from dalle2_fast.training.run import train_stage
from tests.training.parallel.workers import run

STAGES = ("clip", "prior", "ar_prior", "decoder", "upsampler", "upsampler2")
STEPS = 2

# name -> processes, execution, stages
CASES = {
    "2 processes": (2, Execution(), STAGES),
    "4 processes": (4, Execution(), STAGES),
    "one process in parts": (1, Execution(accumulate=4), ("clip", "ar_prior", "upsampler")),
    "accumulate": (2, Execution(accumulate=2, checkpoint_activations=True), ("decoder", "upsampler2")),
    "chunks": (2, Execution(clip_chunk=3), ("clip",)),
    "fsdp": (2, Execution(parallel="fsdp"), ("clip", "ar_prior", "decoder")),
    "hsdp": (4, Execution(parallel="fsdp", shard_size=2, accumulate=2), ("clip",)),
}


def preset_of(stage: str):
    """`tiny` with a batch of 8, stratified times, and Muon in two of the stages."""
    preset = choose_prior(PRESETS["tiny"], "autoregressive" if stage == "ar_prior" else "diffusion")
    name = stage.removeprefix("ar_")
    preset = adjust(preset, (name,), batch_size=8, steps=STEPS)
    recipe = preset.recipe(name)
    optimizer = "muon" if stage in ("clip", "decoder") else "adamw"
    optimisation = replace(recipe.optimisation, log_steps=1, optimizer=optimizer)
    model = recipe.model | ({"stratified": True} if name not in ("clip", "prior") else {})
    return replace(preset, **{name: replace(recipe, model=model, optimisation=optimisation)}), name


def train(out, stages, execution, clip, processes):
    """Train the stages, each in a folder of its own; all but CLIP learn from the CLIP in `clip`."""
    for stage in stages:
        preset, name = preset_of(stage)
        folder = Path(out) / stage
        if processes.is_first and stage != "clip":
            folder.mkdir(parents=True)
            (folder / "clip").symlink_to(clip)
        processes.from_first(None)
        options = dict(dtype=torch.float32, show_progress=False, processes=processes, execution=execution)
        assert train_stage(name, preset, folder, **options) == "finished"


def losses(out: Path, stage: str) -> list[dict]:
    path = out / stage / stage.removeprefix("ar_") / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(out: Path, stage: str) -> dict:
    return load_file(out / stage / stage.removeprefix("ar_") / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of each case, trained when it is asked for, and "alone": one process."""
    folder = tmp_path_factory.mktemp("runs")
    done: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in done:
            out = folder / case.replace(" ", "-")
            clip = folder / "alone" / "clip" / "clip"
            count, execution, stages = CASES.get(case, (1, Execution(), STAGES))
            if case != "alone":
                get("alone")
            run(train, count, folder / "results", str(out), stages, execution, str(clip))
            done[case] = out
        return done[case]

    yield get
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("case", CASES)
def test_same_as_one_process(runs, case):
    """Catches: noise, times, drops or data that depend on the number of processes or of micro-batches; a
    gradient that is summed where it should be averaged; a norm or an average of a part of the weights; a loss
    of the pairs of one process only."""
    alone, many = runs("alone"), runs(case)
    for stage in CASES[case][2]:
        expected, got = losses(alone, stage), losses(many, stage)
        assert [row["step"] for row in got] == list(range(1, STEPS + 1))
        for row, other in zip(expected, got, strict=True):
            assert row["samples"] == other["samples"]
            assert other["loss"] == pytest.approx(row["loss"], rel=2e-5), (stage, row["step"])
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=2e-4), (stage, row["step"])
        first, last = (weights(out, stage) for out in (alone, many))
        assert first.keys() == last.keys()
        for name, value in first.items():
            torch.testing.assert_close(last[name], value, rtol=1e-3, atol=2e-4, msg=f"{stage}: {name}")
