"""The checkpoint folder: what goes in comes out, damage is named, a failed write leaves what was there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle2_fast import checkpoints
from dalle2_fast.checkpoints import CheckpointError, load_config, load_folder, save_folder

CONFIG = {"model": "Toy", "words": ["é", "ring"], "nothing": None, "rate": 0.1}


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "toy.weight": torch.full((3, 4), value),
        "toy.steps": torch.arange(5),
        "toy.flag": torch.tensor(True),
        "toy.empty": torch.zeros(0, 2),
    }


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_round_trip(tmp_path):
    folder = save_folder(tmp_path / "new" / "toy", CONFIG, tensors())
    config, loaded = load_folder(folder)
    assert {key: config[key] for key in CONFIG} == CONFIG and config["format_version"] == 1
    assert same(loaded, tensors())
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert load_config(str(folder)) == config
    # safetensors alone writes a file that other users of the machine may not read
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_dtype_converts_floating_point_only_and_a_copy(tmp_path):
    given = tensors(0.1)
    _, loaded = load_folder(save_folder(tmp_path, CONFIG, given, dtype=torch.bfloat16))
    assert loaded["toy.weight"].dtype == torch.bfloat16 and loaded["toy.steps"].dtype == torch.int64
    assert given["toy.weight"].dtype == torch.float32


def test_views_and_shared_memory(tmp_path):
    """safetensors refuses shared storage and writes strided tensors in the wrong order when told to go on."""
    base = torch.arange(12.0).reshape(3, 4)
    given = {"a": base, "b": base, "c": base.T, "d": base[:, 1]}
    assert same(load_folder(save_folder(tmp_path, {}, given))[1], given)


def test_replaces_and_leaves_other_files(tmp_path):
    save_folder(tmp_path, CONFIG, tensors(1.0))
    (tmp_path / "evaluation.json").write_text("{}")
    save_folder(tmp_path, CONFIG, {"other": torch.ones(2)})
    assert same(load_folder(tmp_path)[1], {"other": torch.ones(2)})
    assert (tmp_path / "evaluation.json").read_text() == "{}"


def test_the_same_checkpoint_is_the_same_bytes(tmp_path):
    """A header whose keys come in a random order, which two saves alone may hide."""
    folders = [save_folder(tmp_path / str(index), CONFIG, tensors()) for index in range(8)]
    for name in ("config.json", "model.safetensors"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


# -------------------------------------------------------------------------------------------- what is wrong


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint folder"):
        load_folder(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder with config.json, got a file"):
        load_folder(file)


def test_empty_and_foreign_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing.*got an empty folder"):
        load_folder(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="config.json is missing.*got model_index.json"):
        load_folder(tmp_path)


def test_missing_weights(tmp_path):
    save_folder(tmp_path, CONFIG, tensors())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        load_folder(tmp_path)


def test_missing_embedded_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.folder, "embedded_path", lambda: tmp_path / "scenes")
    with pytest.raises(FileNotFoundError, match="embedded checkpoint is missing from this installation"):
        load_folder(tmp_path / "scenes")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_weights(tmp_path, length):
    save_folder(tmp_path, CONFIG, tensors())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="model.safetensors: truncated or damaged"):
        load_folder(tmp_path)


def test_one_flipped_bit(tmp_path):
    """safetensors itself would load it: one wrong weight and no word about it."""
    save_folder(tmp_path, CONFIG, tensors())
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match="damaged, or from another save than config.json: expected sha256"
    ):
        load_folder(tmp_path)


def test_files_of_two_saves(tmp_path):
    one, two = (save_folder(tmp_path / str(value), CONFIG, tensors(value)) for value in (1.0, 2.0))
    (one / "model.safetensors").write_bytes((two / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="from another save"):
        load_folder(one)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"format_version": 1, "model"', "damaged, not valid JSON .*line 1"),
        ("\xff\xfe", "damaged, not valid JSON"),
        ("[1, 2]", "expected an object with 'format_version'"),
        ('{"model": "Toy"}', "expected an object with 'format_version'"),
        ('{"format_version": 2}', "unknown format_version 2; this version of dalle2_fast reads 1"),
        ('{"format_version": "one"}', "unknown format_version 'one'"),
    ],
)
def test_bad_config(tmp_path, text, says):
    save_folder(tmp_path, CONFIG, tensors())
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=says):
        load_folder(tmp_path)


# ------------------------------------------------------------------------------------------- failed writing


@pytest.mark.parametrize("config", [{"bad": torch.ones(1)}, {"bad": float("nan")}])
def test_a_config_that_is_not_json_writes_nothing(tmp_path, config):
    with pytest.raises((TypeError, ValueError)):
        save_folder(tmp_path / "toy", config, tensors())
    assert not (tmp_path / "toy").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_save_keeps_the_previous_one(tmp_path, monkeypatch, error):
    save_folder(tmp_path / "toy", CONFIG, tensors(1.0))

    def fail(file):
        raise error

    monkeypatch.setattr(os, "fsync", fail)  # the weights are written by then
    with pytest.raises(type(error)):
        save_folder(tmp_path / "toy", CONFIG, tensors(2.0))
    assert same(load_folder(tmp_path / "toy")[1], tensors(1.0))
    assert sorted(os.listdir(tmp_path / "toy")) == ["config.json", "model.safetensors"]
    with pytest.raises(type(error)):
        save_folder(tmp_path / "fresh", CONFIG, tensors(2.0))
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize("previous", ["whole", "interrupted", "written by hand"])
def test_a_save_that_is_interrupted_at_any_rename_leaves_a_whole_checkpoint(tmp_path, monkeypatch, previous):
    """A kill between the two renames: the config of one save, the weights of another."""
    replace, whole = os.replace, []

    def interrupted_save(n: int, value: float) -> bool:
        """Save, but raise at the n-th rename; was it reached?"""
        calls = iter(range(n))

        def rename(*files):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            replace(*files)

        monkeypatch.setattr(os, "replace", rename)
        try:
            save_folder(tmp_path, {"model": "Toy", "value": value}, tensors(value))
        except KeyboardInterrupt:
            return True
        finally:
            monkeypatch.setattr(os, "replace", replace)
        return False

    for n in range(4):
        save_folder(tmp_path, {"model": "Toy", "value": 1.0}, tensors(1.0))
        if previous == "interrupted":
            assert interrupted_save(2, 1.0) and "successor" in (tmp_path / "config.json").read_text()
        elif previous == "written by hand":
            by_hand = {"format_version": 1, "model": "Toy", "value": 1.0}
            (tmp_path / "config.json").write_text(json.dumps(by_hand))
        reached = interrupted_save(n, 2.0)
        config, loaded = load_folder(tmp_path)
        assert config["value"] == load_config(tmp_path)["value"]
        assert same(loaded, tensors(config["value"])) and "successor_sha256" not in config
        whole.append((reached, config["value"]))
        assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    # config.json announces the weights, the weights are renamed, config.json follows
    assert whole == [(True, 1.0), (True, 1.0), (True, 2.0), (False, 2.0)]


def test_an_interrupted_first_save_is_no_checkpoint(tmp_path, monkeypatch):
    """Half a folder is named, and the next save makes it whole."""

    def refuse(source, target):
        if target.name == "model.safetensors":
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", refuse)
        save_folder(tmp_path, CONFIG, tensors())
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        load_folder(tmp_path)
    assert same(load_folder(save_folder(tmp_path, CONFIG, tensors()))[1], tensors())


FULL_DISK = """
import resource, signal, sys, torch
from dalle2_fast.checkpoints import save_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_folder(sys.argv[1], {}, {"weight": torch.zeros(100_000)})
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on file sizes")
def test_full_disk(tmp_path):
    """The operating system refuses to write on, as it does when the disk is full."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "toy"], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0 and "model.safetensors: cannot be written" in done.stdout, done
    assert not (tmp_path / "toy").exists()


# ---------------------------------------------------------------------------------- weights and their modules


def test_join_states_leaves_out_the_part_inside_another():
    prior = nn.Module()
    prior.net, prior.clip = nn.Linear(2, 2), nn.Linear(3, 3)
    joined = checkpoints.join_states({"clip": prior.clip, "prior": prior, "upsampler": None})
    assert sorted(joined) == ["clip.bias", "clip.weight", "prior.net.bias", "prior.net.weight"]


def test_load_state_names_everything_and_copies_nothing():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = {f"net.{key}": torch.zeros_like(value) for key, value in before.items()}
    del state["net.0.bias"]
    state["net.1.weight"] = torch.zeros(1, 4)
    state["net.2.scale"] = torch.zeros(1)
    expected = (
        "runs/x: the weights do not fit the net of the config: missing 1 (net.0.bias); "
        "left over 1 (net.2.scale); net.1.weight: expected [1, 3], got [1, 4]"
    )
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        checkpoints.load_state(module, state, "net", "runs/x")
    assert same(module.state_dict(), before)


def test_load_state_ignores_other_parts_and_similar_prefixes():
    module = nn.Linear(2, 1)
    state = {"net.weight": torch.ones(1, 2), "net.bias": torch.ones(1), "network.weight": torch.zeros(1)}
    checkpoints.load_state(module, state, "net", "x")
    assert module.weight.tolist() == [[1.0, 1.0]]
    with pytest.raises(CheckpointError, match=r"network\.weight"):
        checkpoints.reject_leftovers(state, ["net"], "x")


def test_reading_a_config_needs_no_weights(tmp_path):
    json.dump({"format_version": 1, "model": "Toy"}, open(tmp_path / "config.json", "w"))
    assert load_config(tmp_path)["model"] == "Toy"
