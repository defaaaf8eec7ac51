"""Valid files with values that no checkpoint holds raise a CheckpointError that names the file."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle2_fast import CLIP, DALLE2, DiffusionPrior
from dalle2_fast.checkpoints import CheckpointError, load_config
from dalle2_fast.checkpoints.formats.diffusers_options import class_name
from dalle2_fast.checkpoints.tensor_files import read_tensors, read_torch
from dalle2_fast.checkpoints.weights import unfilled
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


def rewrite(old, new, change, compression=zipfile.ZIP_DEFLATED):
    """Copy a zip archive; change(name, data) -> data."""
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))


def first_storage(change):
    return lambda name, data: change(data) if name.endswith("/data/0") else data


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


@pytest.mark.parametrize("name", ["layers_per_block", "time_embed_dim", "channels"])
def test_a_config_that_asks_for_far_more_than_the_weights(tmp_path, name):
    """Building 10^9 layers never ends, and 10^9 x 10^9 numbers is an error of torch."""
    folder = tiny_pipeline().save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    unet = config["decoder"]["unet"]
    unet[name] = [10**9] * len(unet[name]) if isinstance(unet.get(name), list) else 10**9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json: decoder: cannot be built"):
        DALLE2.from_pretrained(folder)


def test_layers_without_end_are_not_built(tmp_path):
    """The error comes before the memory is full, and names what the weights hold."""
    tensors = {"a.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="many more tensors than the 1 of the weights"), unfilled(tensors):
        while True:
            torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="far more than the 4 numbers of the weights"), unfilled(tensors):
        torch.linspace(0, 1, 10**9)


@pytest.mark.parametrize("mapped", [False, True])
def test_compressed_records_of_torch_save_are_read_and_not_mapped(tmp_path, mapped):
    """torch maps the compressed bytes and takes them for numbers."""
    expected = {"a": torch.randn(300), "b": torch.ones(40, 3), "c": torch.arange(5)}
    torch.save(expected, tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "small.pt", lambda name, data: data)
    for file in ("good.pt", "small.pt"):
        found = read_torch(tmp_path / file, mapped)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: data + bytes(4)])
def test_storages_of_another_length_than_the_pickle_says(tmp_path, mapped, change):
    """torch reads beyond a storage that is too short: what lies behind it in the file becomes weights."""
    torch.save({"a": torch.ones(300), "b": torch.ones(300)}, tmp_path / "good.pt")
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        rewrite(tmp_path / "good.pt", tmp_path / "bad.pt", first_storage(change), compression)
        with pytest.raises(CheckpointError, match="data/0: expected 1200 bytes, got"):
            read_torch(tmp_path / "bad.pt", mapped)


def test_an_archive_that_is_nearly_all_compression(tmp_path):
    """128 MB of zeros in 0.1 MB of file: a gigabyte would be no longer than a photograph."""
    torch.save({"a": torch.ones(3)}, tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "bomb.pt", first_storage(lambda data: bytes(1 << 27)))
    with pytest.raises(CheckpointError, match="that inflate to 134,.* are no weights"):
        read_torch(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", ": a pointer of Git LFS; `git"),
        (b"\n<!DOCTYPE html><html>Not Found</html>", ": an HTML page, which was saved in the place"),
        (b"", ": .*damaged"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.index.json"])
def test_files_that_are_something_else(tmp_path, name, content, expected):
    """safetensors calls a pointer of Git LFS "header too large"."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(tmp_path / name)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / name}: ") and "\n" not in said
    assert re.search(expected, said)


@pytest.mark.parametrize("other", ["model.safetensors.index.json", "other.bin.index.json", "config.json"])
def test_an_index_that_names_an_index(tmp_path, other):
    """An index that names itself, or another one that names it, was read until Python's stack was full."""
    for name in {"model.safetensors.index.json", other}:
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": other}}))
    with pytest.raises(CheckpointError, match="expected names of files of tensors in its folder"):
        read_tensors(tmp_path / "model.safetensors.index.json")


def test_a_clip_of_siglips_loss(tmp_path):
    """open_clip stores the bias of that loss, on which no embedding depends."""
    state = small().to_state_dict("open_clip")
    torch.save(state | {"logit_bias": torch.tensor(-10.0)}, tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": config_of_open_clip() | {"init_logit_bias": -10}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    loaded = CLIP.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in small().state_dict().items())


def test_a_storage_that_inflates_to_more_than_it_says(tmp_path):
    """A zip bomb fills the memory if its storage is inflated before its size is compared."""
    good, bomb = torchscript(tmp_path / "good.pt", {"a": torch.ones(3)}), tmp_path / "bomb.pt"
    rewrite(good, bomb, first_storage(lambda data: bytes(2**20)))
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


def test_the_legacy_format_claims_no_more_than_the_file_has(tmp_path):
    """torch makes room for the 10^12 numbers first: 4 TB."""
    tensors, file = {"a": torch.ones(16), "b": torch.arange(3)}, tmp_path / "old.pt"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert all(torch.equal(read_tensors(file)[name], value) for name, value in tensors.items())
    file.write_bytes(file.read_bytes().replace(b"K\x10", b"\x8a\x06" + (10**12).to_bytes(6, "little")))
    with pytest.raises(CheckpointError, match="its tensors claim 4,000,000,000,024 bytes"):
        read_tensors(file)


@pytest.mark.parametrize("kind", ["torch.save", "torchscript"])
def test_a_pickle_with_an_object_at_place_2_31(tmp_path, kind):
    """Python's unpickler makes room for every place before it: 32 GB."""
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    if kind == "torch.save":
        torch.save({"a": torch.ones(3)}, good)
    else:
        torchscript(good, {"a": torch.ones(3)})
    rewrite(good, bad, lambda name, data: b"\x80\x02}r\0\0\0\x80." if name.endswith("/data.pkl") else data)
    with pytest.raises(CheckpointError, match="object 2,147,483,648 of the 3 in its pickle"):
        read_tensors(bad)


@pytest.mark.parametrize("config", [NESTED, "[1]", "{", None])
def test_weights_that_a_config_announces_and_that_have_none(tmp_path, config):
    """After an interrupted save, the config is read from there: KeyError, TypeError, RecursionError."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, file, metadata=None if config is None else {"config": config})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "config.json").write_text(json.dumps({"format_version": 1, "successor_sha256": digest}))
    with pytest.raises(CheckpointError, match="model.safetensors: .*no config in its header"):
        load_config(tmp_path)
