"""push_to_hub and the model card, with an object in place of the hub: nothing reaches a network."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from tests.support.tiny_pipeline import load_on_cpu, tiny_pipeline

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(monkeypatch):
    """The calls of HfApi; hub.has_card is what it says of the repository."""
    state = types.SimpleNamespace(calls=[], has_card=False, files={})

    class Api:
        def __init__(self, token=None):
            state.token = token

        def create_repo(self, repo_id, **options):
            state.calls.append(("create_repo", repo_id, options))

        def file_exists(self, repo_id, name, **options):
            return state.has_card

        def upload_folder(self, *, repo_id, folder_path, **options):
            state.calls.append(("upload_folder", repo_id, options))
            state.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return types.SimpleNamespace(commit_url="https://hub.example/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return state


def test_push_uploads_a_checkpoint_that_loads(hub, tmp_path):
    """Catches: a repository that from_pretrained cannot read, or options that do not reach the hub."""
    pipe = tiny_pipeline().eval()
    address = pipe.push_to_hub("owner/rings", private=True, token="t", revision="dev", create_pr=True)
    assert address == "https://hub.example/commit/1" and hub.token == "t"
    (_, created, options), (_, uploaded, rest) = hub.calls
    assert created == uploaded == "owner/rings" and options == {"private": True, "exist_ok": True}
    assert rest["revision"] == "dev" and rest["create_pr"] is True
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(load_on_cpu(tmp_path)("a red ring", 1, seed=0), pipe("a red ring", 1, seed=0))
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: dalle2_fast\n") and "# rings\n" in card
    assert 'DALLE2.from_pretrained("owner/rings")' in card and "16 x 16, 32 x 32" in card


def test_the_card_of_a_person_stays(hub):
    """Catches: a README.md on the hub that a second push replaces."""
    hub.has_card = True
    tiny_pipeline().push_to_hub("owner/rings", dtype=torch.bfloat16)
    assert set(hub.files) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["rings", "a/b/c", "/x", None])
def test_other_names_are_refused(hub, name):
    """Catches: an upload of gigabytes that ends in an error of the hub."""
    with pytest.raises(ValueError, match="^repo_id: expected 'owner/name', got"):
        tiny_pipeline().push_to_hub(name)
    assert hub.calls == []


def test_the_example_of_the_card_runs(tmp_path):
    """Catches: a card whose code fails for a reader, also for a pipeline without a prior."""
    pipe = tiny_pipeline()
    folder = pipe.save_pretrained(tmp_path / "rings", model_card=True)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code, scope)
    assert scope["images"].shape == (4, 3, 32, 32)
    pipe.prior = None
    folder = pipe.save_pretrained(tmp_path / "no-prior", model_card=True)
    assert "pipe.variations(image, 4, seed=0)" in (folder / "README.md").read_text()
    assert not (pipe.save_pretrained(tmp_path / "plain") / "README.md").exists()
