"""What defines a run is remembered, and one command at a time works on it. Each test names its fault."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle2_fast.cli import main
from dalle2_fast.data import WordTokenizer
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.run import train_stage
from dalle2_fast.training.run_folder.lock import run_lock
from dalle2_fast.training.weights import load_config, load_weights
from tests.support.toy_training import toy_trainer

WORDS = "harbour dog sea bicycle lamp tree window cup".split()


def write_shard(path: Path, count: int = 60, offset: int = 0) -> Path:
    with tarfile.open(path, "w") as tar:
        for index in range(offset, offset + count):
            png = io.BytesIO()
            Image.new("RGB", (20, 16), (4 * index % 255, 90, 7 * index % 255)).save(png, format="PNG")
            caption = f"a quiet {WORDS[index % 8]} and a {WORDS[index // 8 % 8]}".encode()
            for ending, data in (("png", png.getvalue()), ("txt", caption)):
                entry = tarfile.TarInfo(f"{index:04d}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def data(tmp_path):
    pytest.importorskip("webdataset")
    return write_shard(tmp_path / "big.tar")


def train(out, *options, stage="clip", preset="tiny"):
    given = ["--preset", preset] if preset else []
    return main(["train", stage, *given, "--out", str(out), "--device", "cpu", "--quiet", *map(str, options)])


def rows_of(out, stage):
    return [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]


def same_weights(a, b):
    a, b = (load_weights(path / "model.safetensors")[1] for path in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_goes_on_with_its_data_length_and_settings(data, tmp_path, capsys, monkeypatch):
    """Catches: stages that learn rendered scenes after --resume without --data; a length, batch size,
    learning rate or seed that is forgotten, also for stages that had not begun."""
    options = ("--steps", 6, "--batch-size", 6, "--lr", 2e-3, "--seed", 5)
    assert train(tmp_path / "whole", "--data", data, *options, stage="all") == 0
    out = tmp_path / "cut"
    monkeypatch.chdir(tmp_path)
    assert train(out, "--data", data.name, *options, "--pause-after", 0, stage="all") == 0
    monkeypatch.chdir("/")
    assert train(out, "--resume", stage="all", preset=None) == 0
    for stage in ("clip", "prior", "decoder", "upsampler"):
        assert same_weights(tmp_path / "whole" / stage, out / stage), stage
        assert rows_of(out, stage)[-1]["samples"] == 36
    assert json.loads((out / "config.json").read_text())["metadata"]["world"] is None


def test_other_data_are_refused_by_name_and_taken_with_override(data, tmp_path, capsys):
    """Catches: another --data on resume, or in a later stage, without a word; the same file under another
    spelling that is refused; shards that have changed."""
    out, other = tmp_path / "out", write_shard(tmp_path / "other.tar", offset=3)
    assert train(out, "--data", data) == 0
    assert train(out, "--data", other, stage="prior") == 2
    assert "--data: the run has" in (error := capsys.readouterr().err)
    assert "big.tar" in error and "other.tar" in error and "--override" in error and error.count("\n") == 1
    assert not (out / "prior").exists()
    assert train(out, "--data", os.path.relpath(data), "--pause-after", 0, stage="prior") == 0
    assert train(out, "--resume", "--data", other, stage="prior") == 2
    write_shard(data, count=61)
    with data.open("ab") as file:
        file.write(bytes(10240))
    assert train(out, "--resume", stage="prior") == 2
    assert "--data: the run has" in capsys.readouterr().err
    assert train(out, "--resume", "--override", "--data", other, stage="prior") == 0
    assert json.loads((out / "run.json").read_text())["run"]["data"]["shards"] == str(other)


def test_a_later_stage_takes_the_data_of_the_run(data, tmp_path, capsys):
    """Catches: `train prior` after `train clip --data` that learns scenes, and the reverse; --tokenizer."""
    out = tmp_path / "out"
    assert train(out, "--data", data) == 0
    assert train(out, stage="prior") == 0
    (out / "tokenizer.json").write_text(json.dumps(WordTokenizer([*WORDS, "a", "and", "quiet"]).to_config()))
    assert train(out, stage="decoder") == 2
    assert "--tokenizer: the run has WordTokenizer" in capsys.readouterr().err
    scenes = tmp_path / "scenes"
    assert train(scenes) == 0
    assert train(scenes, "--data", data, stage="prior") == 2
    assert "--data: the run has none" in capsys.readouterr().err


def test_settings_that_differ_are_named(tmp_path, capsys):
    """Catches: --resume that takes the new batch size and learning rate, but silently the old decay."""
    assert train(tmp_path, "--pause-after", 0, "--freeze", "visual.", "--dtype", "bf16") == 0
    changes = (["--batch-size", 8], ["--lr", 0.5], ["--steps", 9], ["--dtype", "fp32"], ["--seed", 3],
               ["--freeze", "text"])  # fmt: skip
    for option, value in changes:
        assert train(tmp_path, "--resume", option, value) == 2
        error = capsys.readouterr().err
        assert f"{'--steps, --minutes' if option == '--steps' else option}: the run has" in error
        assert error.count("\n") == 1
    assert train(tmp_path, "--resume", "--override", "--seed", 3) == 2  # another beginning
    assert "cannot change within a run" in capsys.readouterr().err
    assert train(tmp_path, "--resume", "--batch-size", 8, "--lr", 0.5, "--override") == 0
    assert rows_of(tmp_path, "clip")[-1]["samples"] == 32
    assert load_config(tmp_path / "clip" / "model.safetensors")["freeze"] == ["visual."]


def test_samples_are_counted_with_the_batch_size_of_their_step(tmp_path):
    """Catches: a log that counts all steps with the batch size of the last command."""
    toy_trainer(tmp_path, steps=10).train()
    resumed = toy_trainer(tmp_path, steps=12, batch_size=100, weight_decay=0.7)
    assert [group["weight_decay"] for group in resumed.state.optimizers[0].param_groups] == [0.7, 0.0]
    resumed.train()
    assert resumed.state.samples == 10 * 4 + 2 * 100


def test_a_state_of_the_previous_release_resumes(tmp_path, capsys):
    """Catches: a state without record and without a count of samples that is refused."""
    assert train(tmp_path, "--pause-after", 0) == 0
    (tmp_path / "run.json").unlink()
    path = tmp_path / "clip" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["samples"]
    torch.save(state, path)
    assert train(tmp_path, "--resume", "--batch-size", 8) == 0
    assert "no record of settings" in capsys.readouterr().out
    assert rows_of(tmp_path, "clip")[-1]["samples"] == 32


def test_a_finished_stage_is_extended_or_says_how(trained, tmp_path, capsys):
    """Catches: --resume --steps MORE of a finished stage that does nothing and exits with 0."""
    assert train(tmp_path) == 0
    first = load_weights(tmp_path / "clip" / "model.safetensors")[1]
    assert train(tmp_path, "--resume", "--steps", 8) == 2
    assert "the run has 4 steps, got 8 steps" in (error := capsys.readouterr().err) and "--override" in error
    assert train(tmp_path, "--resume", "--steps", 8, "--override", "--pause-after", 0) == 0
    assert train(tmp_path, "--resume") == 0, "an extension that was stopped goes on"
    assert load_config(tmp_path / "clip" / "model.safetensors")["steps"] == 8
    last = load_weights(tmp_path / "clip" / "model.safetensors")[1]
    assert any(not torch.equal(first[name], last[name]) for name in first)
    capsys.readouterr()
    assert train(tmp_path, "--resume") == 0
    assert "already finished, skipped" in capsys.readouterr().out
    # Of the previous release.
    (tmp_path / "run.json").unlink()
    assert train(tmp_path, "--resume", "--steps", 6) == 0
    assert train(tmp_path, "--resume", "--steps", 12) == 2
    assert "finished after 8 steps" in capsys.readouterr().err
    (tmp_path / "clip" / "state.pt").unlink()
    (tmp_path / "clip" / "state.previous.pt").unlink(missing_ok=True)
    assert train(tmp_path, "--resume", "--steps", 12, "--override") == 2
    assert "cannot be trained further without it" in capsys.readouterr().err


def test_metrics_are_of_data_that_are_not_trained_on(data, tmp_path, capsys):
    """Catches: metrics on training data; a failure where no sample is held out."""
    few = write_shard(tmp_path / "few.tar", count=3)
    assert train(tmp_path / "few", "--data", few) == 0
    assert "no metrics" in capsys.readouterr().out
    assert "top1" not in rows_of(tmp_path / "few", "clip")[-1]
    assert train(tmp_path / "val", "--data", few, "--val-data", data) == 0
    assert "top1" in rows_of(tmp_path / "val", "clip")[-1]
    assert train(tmp_path / "scenes", "--val-data", data) == 2
    assert "--val-data: is for a run on shards" in capsys.readouterr().err


def test_clip_needs_two_pairs_and_mentions_repeated_ones(tmp_path, capsys):
    """Catches: a loss of 0 that trains nothing, and pairs that are each other's negatives without a word."""
    pytest.importorskip("webdataset")
    assert train(tmp_path / "one", "--batch-size", 1) == 2
    assert "expected at least 2, got 1" in capsys.readouterr().err
    few = write_shard(tmp_path / "few.tar", count=3)
    assert train(tmp_path / "few", "--data", few) == 0
    assert capsys.readouterr().out.count("pairs repeat another pair of their batch") == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_undecodable_image_does_not_stop_training(tmp_path):
    """Catches: one bad image that ends a run with batches of one, which --resume repeats."""
    pytest.importorskip("webdataset")
    shard = write_shard(tmp_path / "data.tar", count=4)
    content = shard.read_bytes().replace(b"\x89PNG", b"\x00PNG", 1)
    shard.write_bytes(content)
    assert train(tmp_path / "out", "--data", shard, "--batch-size", 2, "--steps", 8, stage="upsampler") == 0


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_freeze_until_no_matrix_or_nothing_is_left(tmp_path, optimizer):
    """Catches: Muon without a matrix; an optimiser without a parameter."""
    from dataclasses import replace

    preset = PRESETS["tiny"]
    options = replace(preset.clip.optimisation, optimizer=optimizer)
    preset = replace(preset, clip=replace(preset.clip, optimisation=options))
    quiet = dict(show_progress=False)
    assert train_stage("clip", preset, tmp_path / "scale", freeze=["text", "visual"], **quiet) == "finished"
    with pytest.raises(ValueError, match="--freeze: .* leaves no weight to train"):
        train_stage("clip", preset, tmp_path / "all", freeze=[""], **quiet)


def test_only_damage_is_called_damage(tmp_path, monkeypatch):
    """Catches: a good state that the user is told to delete because the memory was full."""
    toy_trainer(tmp_path, steps=4).train()
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="the file is whole") as caught:
        def full(*args, **options):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        patch.setattr(torch, "load", full)
        toy_trainer(tmp_path)
    assert "damaged" not in str(caught.value) and "delete" not in str(caught.value)
    devices, load = [], torch.load

    def record(path, map_location, **options):
        devices.append(str(map_location))
        return load(path, map_location, **options)

    monkeypatch.setattr(torch, "load", record)
    toy_trainer(tmp_path)
    assert devices == ["cpu"]
    path = tmp_path / "state.pt"
    content, weight = bytearray(path.read_bytes()), load(path)["model"]["0.weight"]
    content[content.find(weight.numpy().tobytes()) + 5] ^= 255  # torch loads this without a word
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="damaged training state"):
        toy_trainer(tmp_path)


@pytest.mark.parametrize("part", ["ema", "model", "optimizers", "step"])
def test_a_state_without_a_part_is_one_line(tmp_path, part):
    """Catches: a KeyError with a traceback."""
    toy_trainer(tmp_path, steps=4).train()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state[part]
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(TrainingError, match=f"cannot resume: it has no '{part}'"):
        toy_trainer(tmp_path)
    state[part] = {"average": 3} if part == "ema" else 3 if part != "step" else "x"
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(TrainingError, match="cannot resume: it does not fit"):
        toy_trainer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 9}',
                                     '{"format_version": 1, "run": {}, "stages": {}}'])  # fmt: skip
def test_a_damaged_record_is_one_line(tmp_path, capsys, content):
    """Catches: a traceback, or settings that are silently forgotten."""
    assert train(tmp_path, "--pause-after", 0) == 0
    (tmp_path / "run.json").write_text(content)
    assert train(tmp_path, "--resume") == 2
    assert "run.json: " in (error := capsys.readouterr().err) and error.count("\n") == 1


HOLD = """
import sys, time
from dalle2_fast.training.run_folder.lock import run_lock
with run_lock(sys.argv[1]):
    print("go", flush=True)
    time.sleep(60)
"""


def test_one_command_at_a_time_and_no_lock_outlives_a_kill(tmp_path, capsys):
    """Catches: two commands that mix their logs in one folder; a lock that a killed command leaves behind."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                              env=environment)  # fmt: skip
    try:
        assert holder.stdout.readline() == "go\n"
        assert train(tmp_path) == 2
        error = capsys.readouterr().err
        assert f"another command (process {holder.pid}) is training in" in error and error.count("\n") == 1
        assert os.listdir(tmp_path) == [".lock"]
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert train(tmp_path) == 0
    finally:
        holder.kill()
    assert ".lock" not in os.listdir(tmp_path)
    with run_lock(tmp_path), pytest.raises(TrainingError, match="another command"), run_lock(tmp_path):
        pass


def test_copies_that_cannot_meet_are_refused(tmp_path, capsys, monkeypatch):
    """Catches: N copies that train into one folder; a distillation in N copies, which is one process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(tmp_path / "out") == 2
    assert "the processes did not meet" in capsys.readouterr().err
    distill = ["distill", "prior", "--teacher", str(tmp_path), "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(distill) == 2
    assert "without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_killed_before_its_first_state_keeps_its_settings(data, trained, tmp_path, capsys):
    """Catches: data, frozen weights and initial weights that are forgotten if the kill comes early; a
    tokenizer of a killed run in a new one; finished weights that a new run is taken for."""
    init = trained / "clip" / "model.safetensors"
    out = tmp_path / "init"
    assert train(out, "--init", init, "--freeze", "visual.", "--pause-after", 0) == 0
    for path in (out / "clip").glob("state*"):
        path.unlink()
    assert train(out, "--resume") == 0
    before, after = load_weights(init)[1], load_weights(out / "clip" / "model.safetensors")[1]
    assert all(torch.equal(before[name], after[name]) == name.startswith("visual.") for name in before)
    (out / "clip" / "state.pt").unlink()
    (out / "clip" / "state.previous.pt").unlink()
    assert train(out) == 2
    assert "already holds a finished stage" in capsys.readouterr().err

    out = tmp_path / "data"
    assert train(out, "--data", data, "--pause-after", 0) == 0
    first = (out / "tokenizer.json").read_text()
    for path in (*(out / "clip").glob("state*"), out / "tokenizer.json"):
        path.unlink()
    assert train(out, "--resume", "--pause-after", 0) == 0
    assert (out / "tokenizer.json").read_text() == first
    for path in (out / "clip").glob("state*"):
        path.unlink()
    assert train(out, "--data", write_shard(tmp_path / "other.tar", count=2)) == 0
    assert (out / "tokenizer.json").read_text() != first


def test_an_older_state_is_given_no_initial_weights(trained, tmp_path, capsys):
    """Catches: --init on a state without a record that is recorded, and not loaded."""
    assert train(tmp_path, "--pause-after", 0) == 0
    (tmp_path / "run.json").unlink()
    assert train(tmp_path, "--resume", "--init", trained / "clip" / "model.safetensors") == 2
    error = capsys.readouterr().err
    assert "--init: " in error and "older release" in error and error.count("\n") == 1
    assert train(tmp_path, "--resume", "--pause-after", 0) == 0


def test_the_pipeline_has_the_preset_of_its_stages(trained, capsys):
    """Catches: --export that gives stages the world and the sampling of another preset."""
    config = (trained / "config.json").read_bytes()
    assert train(trained, "--export", stage="all", preset="scenes-cpu") == 2
    assert "--preset: expected that of the run" in (error := capsys.readouterr().err)
    assert "tiny, got scenes-cpu" in error and error.count("\n") == 1
    assert (trained / "config.json").read_bytes() == config
