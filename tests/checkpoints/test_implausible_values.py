"""Valid files with values that no checkpoint holds raise a CheckpointError that names the file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle2_fast import CLIP, DiffusionPrior
from dalle2_fast.checkpoints import CheckpointError, load_config
from dalle2_fast.checkpoints.formats.diffusers_options import class_name
from dalle2_fast.checkpoints.tensor_files import read_tensors
from dalle2_fast.data import BPETokenizer
from tests.support.clip_cases import config_of_hugging_face, config_of_open_clip, small, torchscript
from tests.support.tiny_pipeline import tiny_pipeline

# torch.jit, which writes archives like OpenAI's, is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NESTED = "[" * 100_000  # json raises RecursionError for it


def numbers_as(value: object, replacement: object) -> object:
    """The same JSON with every number replaced."""
    if isinstance(value, dict):
        return {name: numbers_as(each, replacement) for name, each in value.items()}
    if isinstance(value, list):
        return [numbers_as(each, replacement) for each in value]
    return replacement if isinstance(value, int | float) and not isinstance(value, bool) else value


def test_json_that_is_nested_too_deeply(tmp_path):
    folder = tiny_pipeline().prior.save_pretrained(tmp_path)
    (folder / "config.json").write_text(NESTED)
    with pytest.raises(CheckpointError, match="config.json: damaged, not valid JSON"):
        load_config(folder)
    assert class_name(folder / "config.json") is None
    (folder / "tokenizer.json").write_text(NESTED)
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        BPETokenizer.from_folder(folder)


@pytest.mark.parametrize("number", [10**9, -3])
def test_sizes_that_no_machine_has(tmp_path, number):
    """torch raises RuntimeError for tensors of these sizes."""
    folder = tiny_pipeline().prior.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["prior"] = numbers_as(config["prior"], number)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json: prior: cannot be built"):
        DiffusionPrior.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["dalle2_fast", "hugging face"])
def test_integers_in_the_place_of_weights(tmp_path, kind):
    """torch refuses them as parameters with a RuntimeError; copied into floats, they load in silence."""
    if kind == "dalle2_fast":
        model, name = tiny_pipeline().prior, "prior.net.query"
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        del config["weights_sha256"]
    else:
        model, name, config = small(), "visual_projection.weight", config_of_hugging_face()
        save_file(model.to_state_dict("huggingface"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: expected floating-point numbers, got torch.int32"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("replacement", ["word", [1], 0])
@pytest.mark.parametrize("kind", ["hugging face", "open_clip"])
def test_configurations_of_a_clip_with_values_of_another_type(tmp_path, kind, replacement):
    if kind == "hugging face":
        save_file(small().to_state_dict("huggingface"), tmp_path / "model.safetensors")
        file, config = tmp_path / "config.json", config_of_hugging_face()
    else:
        torch.save(small().state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        file, config = tmp_path / "open_clip_config.json", {"model_cfg": config_of_open_clip()}
    file.write_text(json.dumps(numbers_as(config, replacement)))
    with pytest.raises(CheckpointError):
        CLIP.from_pretrained(tmp_path)


def test_a_storage_that_inflates_to_more_than_it_says(tmp_path):
    """A zip bomb fills the memory if its storage is inflated before its size is compared."""
    good, bomb = torchscript(tmp_path / "good.pt", {"a": torch.ones(3)}), tmp_path / "bomb.pt"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(2**20) if name.endswith("/data/0") else old.read(name))
    inflated = []
    read = zipfile.ZipFile.read

    def watched(archive, name, *options):
        inflated.append(str(Path(getattr(name, "filename", name)).name))
        return read(archive, name, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "read", watched)
        with pytest.raises(CheckpointError, match="expected 12 bytes, got 1048576"):
            read_tensors(bomb)
    assert inflated == ["data.pkl"]
