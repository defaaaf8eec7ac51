"""The files of a stage. Each test names the fault it would catch."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder, write_file
from dalle2_fast.training.weights import load_weights, save_weights
from tests.support.toy_training import toy_trainer


def test_write_that_fails_midway_leaves_the_old_file(tmp_path, monkeypatch):
    """Catches: writing in place. A full disk shows as OSError from write()."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half(path, data):
        path.open("wb").write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="cannot write .*file: No space"):
        patch.setattr(Path, "write_bytes", half)
        write_file(path, b"new, but on a full disk")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="Windows flushes no folders")
def test_the_new_name_is_flushed_after_the_rename(tmp_path, monkeypatch):
    """Catches: a write that a power cut undoes; a folder that cannot be flushed, taken for a fault."""
    steps = []
    flush, rename = os.fsync, os.replace

    def flush_and_refuse(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("folder" if is_folder else "file")
        if is_folder:
            raise OSError(22, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_and_refuse)
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("rename"), rename(*names)))
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert steps == ["file", "rename", "folder"]


def test_full_disk_while_training_keeps_both_states(tmp_path, monkeypatch):
    """Catches: rotating the good state away before the new one is whole."""
    trainer = toy_trainer(tmp_path, steps=10, save_steps=5)
    trainer.train()
    before = {p.name: p.read_bytes() for p in tmp_path.glob("state*.pt")}
    assert set(before) == {"state.pt", "state.previous.pt"}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="cannot write .*No space left"):
        trainer.save()
    assert {p.name: p.read_bytes() for p in tmp_path.glob("state*")} == before


def test_kill_between_the_two_renames_and_leftovers(tmp_path):
    """Catches: a moment at which no state is found; temporary files of a killed run that stay."""
    toy_trainer(tmp_path, steps=10, save_steps=5).train()
    os.replace(tmp_path / "state.pt", tmp_path / "state.previous.pt")  # what such a kill leaves behind
    (tmp_path / ".state.pt.123.partial").write_bytes(b"half")
    (tmp_path / "state.pt.partial").write_bytes(b"half, of the previous release")
    resumed = toy_trainer(tmp_path, steps=20)
    assert resumed.state.step == 10
    assert not list(tmp_path.glob("*.partial"))


def test_damaged_state_is_named(tmp_path):
    """Catches: a traceback from the unpickler, or a silent new start."""
    toy_trainer(tmp_path, steps=4, save_steps=2).train()
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:500])
    with pytest.raises(TrainingError, match="damaged training state.*state.previous.pt"):
        toy_trainer(tmp_path)


def test_unwritable_folder(tmp_path):
    """Catches: an error only after an hour. A file is where the folder should be (that also stops root)."""
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(TrainingError, match="--out: cannot write to .*out"):
        StageFolder(tmp_path / "out" / "clip").prepare()


def test_weights_file_round_trip_and_damage(tmp_path):
    """Catches: a configuration that is lost or changed; a traceback for a truncated file."""
    path = tmp_path / "model.safetensors"
    save_weights(path, {"model": {"dim": 3}}, {"w": torch.arange(6.0).view(2, 3).T})
    config, tensors = load_weights(path)
    assert config == {"model": {"dim": 3}}
    assert torch.equal(tensors["w"], torch.arange(6.0).view(2, 3).T)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TrainingError, match="model.safetensors: not a readable weights file"):
        load_weights(path)
