"""Ids of the Hugging Face hub: what is one, what is fetched, the cache, errors without network or package.

No network: the cache is made by hand, as huggingface_hub lays it out, and its answers are put in its mouth.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dalle2_fast import DALLE2, Decoder
from dalle2_fast.checkpoints.hub import fetch, files_to_fetch, locate
from tests.support.tiny_pipeline import load_on_cpu, tiny_pipeline

ID = "somebody/tiny-unclip"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub with an empty cache; any request is a failed connection."""
    for module in ("constants", "errors"):  # they are loaded on first use
        pytest.importorskip(f"huggingface_hub.{module}", reason="huggingface_hub is not installed")
    package = sys.modules["huggingface_hub"]
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(package.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(package.HfApi, "list_repo_files", refuse)
    package.cache = cache
    return package


def put_into_cache(cache: Path, revision: str = "main") -> Path:
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = cache / "models--somebody--tiny-unclip"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    return tiny_pipeline().save_pretrained(place / "snapshots" / commit)


def test_what_lies_in_the_cache_is_loaded_without_network(hub):
    folder = put_into_cache(hub.cache)
    assert locate(ID) == folder
    pipe, expected = load_on_cpu(ID), tiny_pipeline()
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in pipe.state_dict().items())
    assert Decoder.from_pretrained(Path(ID)).image_size == 16  # as the command line gives it
    with pytest.raises(FileNotFoundError, match="not in the Hugging Face hub's cache"):
        DALLE2.from_pretrained(ID, revision="v2")
    put_into_cache(hub.cache, "v2")
    assert DALLE2.from_pretrained(ID, revision="v2").sizes == (16, 32)


def test_offline_mode_is_honoured(hub, monkeypatch):
    monkeypatch.undo()  # the real HfApi, which refuses by itself
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"not fetched \(Offline"):
        fetch(ID)
    folder = put_into_cache(hub.cache)
    assert fetch(ID) == folder


def test_without_network_and_cache_both_are_named(hub):
    says = (f"{ID}: no such checkpoint folder, not in the Hugging Face hub's cache, and not fetched "
            r"\(ConnectionError: no route to the hub\)")
    with pytest.raises(FileNotFoundError, match=says):
        DALLE2.from_pretrained(ID)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    says = r"no such checkpoint folder.*pip install 'dalle2-fast\[hub\]'"
    with pytest.raises(FileNotFoundError, match=says):
        DALLE2.from_pretrained(ID)


def test_only_the_wanted_files_are_fetched(hub, monkeypatch):
    asked = {}
    listing = ["README.md", "model_index.json", "prior/config.json", "tokenizer/merges.txt",
               "prior/diffusion_pytorch_model.bin", "prior/diffusion_pytorch_model.safetensors",
               "prior/diffusion_pytorch_model.fp16.safetensors", "text_encoder/flax_model.msgpack"]
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *x, **y: listing)

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return "/the/snapshot"

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert fetch(ID, "v2") == Path("/the/snapshot")
    assert (asked["repo_id"], asked["revision"]) == (ID, "v2")
    assert asked["allow_patterns"] == ["model_index.json", "prior/config.json",
                                       "prior/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"]


@pytest.mark.parametrize(("names", "kept"), [
    (["a/x.bin", "b/x.safetensors"], ["a/x.bin", "b/x.safetensors"]),
    (["a/x.fp16.safetensors", "a/x.fp16.bin"], ["a/x.fp16.safetensors"]),
    (["a/x.fp16.safetensors", "a/x.bin"], ["a/x.bin"]),
    (["x.non_ema.safetensors", "x.safetensors", "x.safetensors.index.json"],
     ["x.safetensors", "x.safetensors.index.json"]),
    (["x-00001-of-00002.bin", "x-00002-of-00002.bin"], ["x-00001-of-00002.bin", "x-00002-of-00002.bin"]),
    (["prior-ckpt-step=01000000-of-01000000.ckpt", "improved-sr-ckpt-step=1.2M.ckpt", "ViT-L-14_stats.th",
      "ViT-L-14.pt"],
     ["ViT-L-14.pt", "ViT-L-14_stats.th", "improved-sr-ckpt-step=1.2M.ckpt",
      "prior-ckpt-step=01000000-of-01000000.ckpt"]),
])  # fmt: skip
def test_one_kind_of_weights_a_folder(names, kept):
    assert files_to_fetch(names) == kept


@pytest.mark.parametrize("name", ["RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"])
def test_what_the_hub_refuses(hub, monkeypatch, name):
    kind = getattr(hub.errors, name)

    def refuse(*args, **options):
        raise kind.__new__(kind)

    monkeypatch.setattr(hub.HfApi, "list_repo_files", refuse)
    says = {"RepositoryNotFoundError": "hub has no such checkpoint", "GatedRepoError": "logged in",
            "RevisionNotFoundError": "hub has no such revision 'v9'"}[name]
    with pytest.raises(FileNotFoundError, match=says):
        fetch(ID, "v9" if name.startswith("Revision") else None)


@pytest.mark.parametrize("path", ["nowhere", "./some/where", "/some/where", "a/b/c", "~/x/y", "runs/x"])
def test_what_is_no_id_is_never_asked_for(hub, monkeypatch, path):
    Path("runs").mkdir()  # a folder of one's own, in which x was forgotten
    monkeypatch.setattr("dalle2_fast.checkpoints.hub.fetch", lambda *x: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        DALLE2.from_pretrained(path)


def test_a_revision_of_a_local_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="revision: expected None for a local path"):
        DALLE2.from_pretrained(tmp_path, revision="main")
