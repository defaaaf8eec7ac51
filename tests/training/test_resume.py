"""Stages of `tiny` that are stopped and continued. Each test names the fault it would catch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dalle2_fast.cli import main
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import STAGES, choose_prior
from dalle2_fast.training.run import train_stage
from dalle2_fast.training.trainer import Trainer
from dalle2_fast.training.weights import load_weights


@pytest.mark.parametrize("stage", STAGES)
def test_a_paused_stage_continues_bit_identically(trained, tmp_path, stage):
    """Catches: randomness of a model or stream that the step's seed does not reach."""
    (tmp_path / "clip").symlink_to(trained / "clip") if stage != "clip" else None
    preset = PRESETS["tiny"]
    assert train_stage(stage, preset, tmp_path, pause_after=0.0, show_progress=False) == "paused"
    # Then a run that is killed after its second step.
    options = dataclasses.replace(preset.recipe(stage).optimisation, save_steps=2)
    recipe = dataclasses.replace(preset.recipe(stage), optimisation=options)
    preset = dataclasses.replace(preset, **{stage: recipe})
    with pytest.raises(Killed):
        with killed_at(3):
            train_stage(stage, preset, tmp_path, resume=True, show_progress=False)
    state = torch.load(tmp_path / stage / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert train_stage(stage, preset, tmp_path, resume=True, show_progress=False) == "finished"
    _, resumed = load_weights(tmp_path / stage / "model.safetensors")
    _, whole = load_weights(trained / stage / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Killed(BaseException):
    pass


class killed_at:
    """Within the block the trainer's backward of step `step` raises."""

    def __init__(self, step):
        self.step = step

    def __enter__(self):
        self.backward, limit = Trainer._backward, self.step

        def backward(trainer):
            if trainer.state.step >= limit:
                raise Killed
            return self.backward(trainer)

        Trainer._backward = backward

    def __exit__(self, *_):
        Trainer._backward = self.backward


@pytest.mark.parametrize("stage, prior", [("prior", "autoregressive"), ("upsampler2", "diffusion")])
def test_the_other_stages_resume_bit_identically(trained, tmp_path, stage, prior):
    """Catches: buckets fitted to other data after a resume, scenes shared with the first upsampler."""
    preset = choose_prior(PRESETS["tiny"], prior)
    for out in ("whole", "paused"):
        (tmp_path / out).mkdir()
        (tmp_path / out / "clip").symlink_to(trained / "clip")
    assert train_stage(stage, preset, tmp_path / "whole", show_progress=False) == "finished"
    assert train_stage(stage, preset, tmp_path / "paused", pause_after=0.0, show_progress=False) == "paused"
    assert train_stage(stage, preset, tmp_path / "paused", resume=True, show_progress=False) == "finished"
    _, whole = load_weights(tmp_path / "whole" / stage / "model.safetensors")
    _, resumed = load_weights(tmp_path / "paused" / stage / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_state_from_before_an_option_resumes(tmp_path):
    """Catches: an update that refuses a state because it adds an option, which is at its default."""
    preset = PRESETS["tiny"]
    assert train_stage("upsampler", preset, tmp_path, pause_after=0.0, show_progress=False) == "paused"
    path = tmp_path / "upsampler" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["model"]["sample_tile"]
    torch.save(state, path)
    assert train_stage("upsampler", preset, tmp_path, resume=True, show_progress=False) == "finished"


def test_a_resumed_run_knows_its_prior(trained, tmp_path, capsys):
    """Catches: a state that is refused because --prior was not repeated; one that is loaded into another kind
    of prior because --prior was wrong."""
    (tmp_path / "clip").symlink_to(trained / "clip")
    command = ["train", "prior", "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu", "--quiet"]
    assert main([*command, "--prior", "autoregressive", "--pause-after", "0"]) == 0
    assert main([*command, "--resume", "--prior", "diffusion"]) == 2
    error = capsys.readouterr().err
    assert "cannot resume" in error and "--prior: the run has autoregressive, got diffusion" in error
    assert main([*command, "--resume", "--pause-after", "-1"]) == 2
    assert "--pause-after: expected at least 0, got -1.0" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    config, _ = load_weights(tmp_path / "prior" / "model.safetensors")
    assert config["class"] == "ARPrior"


def test_resume_skips_what_is_finished(trained, capsys):
    """Catches: training a finished stage once more, or refusing to."""
    arguments = ["train", "all", "--preset", "tiny", "--out", str(trained), "--device", "cpu", "--quiet"]
    before = (trained / "decoder" / "state.pt").stat().st_mtime_ns
    assert main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out.count("already finished, skipped") == 4
    assert (trained / "decoder" / "state.pt").stat().st_mtime_ns == before
