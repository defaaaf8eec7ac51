"""use_losses in both forms of open_clip, which make their loss in different modules.

The package needs torchvision, so its two layouts are played by small packages of the same shape.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dalle2_fast import SigLipLoss
from dalle2_fast.adapters import open_clip

ROOT = Path(__file__).resolve().parents[2]
LOSS = """
class ClipLoss:
    def __init__(self, **options): pass
class SigLipLoss(ClipLoss): pass
class CoCaLoss(ClipLoss): pass
"""
FACTORY = """
from .loss import ClipLoss, CoCaLoss, SigLipLoss
def create_loss(args): return SigLipLoss() if args == "siglip" else ClipLoss()
"""
TASK = """
class CLIPTask:
    def __init__(self):
        from open_clip.loss import ClipLoss
        self.loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
class SigLIPTask:
    def __init__(self):
        from open_clip.loss import SigLipLoss
        self.loss = SigLipLoss(rank=0, world_size=1, dist_impl=None, chunk_size=1024)
"""
TRAIN = """
from open_clip import %s
def main(arguments):
    made = %s
    print(arguments, *(type(loss).__module__.partition(".")[0] for loss in made))
"""


def package(folder: Path, form: str) -> Path:
    """open_clip and open_clip_train: "factory" as in 3.3, "task" as in later versions, "other" as in none."""
    place, train = folder / "open_clip", folder / "open_clip_train"
    place.mkdir()
    train.mkdir()
    (place / "loss.py").write_text(LOSS if form != "other" else "class Loss: pass\n")
    (train / "__init__.py").write_text("")
    if form == "factory":
        (place / "__init__.py").write_text("from .factory import create_loss\nfrom .loss import ClipLoss\n")
        (place / "factory.py").write_text(FACTORY)
        made = 'create_loss("clip"), create_loss("siglip")'
        (train / "main.py").write_text(TRAIN % ("create_loss", made))
    else:
        (place / "__init__.py").write_text("from .task import CLIPTask, SigLIPTask\n")
        (place / "task.py").write_text(TASK)
        (train / "main.py").write_text(TRAIN % ("CLIPTask, SigLIPTask", "CLIPTask().loss, SigLIPTask().loss"))
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=folder, text=True, capture_output=True,
                          env={"PYTHONPATH": f"{folder}:{ROOT}", "PATH": ""})  # fmt: skip


@pytest.mark.parametrize("form", ["factory", "task"])
def test_the_training_script_makes_our_losses(tmp_path, form):
    """Catches: a documented line after which training runs with open_clip's loss."""
    done = run(package(tmp_path, form), "-m", "dalle2_fast.adapters.open_clip", "--model", "ViT-B-32")
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    assert last == "['--model', 'ViT-B-32'] dalle2_fast dalle2_fast"
    assert "dalle2_fast: open_clip.loss.ClipLoss is now dalle2_fast.losses.clip_loss.ClipLoss" in said


def test_another_layout_is_refused(tmp_path):
    """Catches: silence where nothing was replaced."""
    done = run(package(tmp_path, "other"), "-m", "dalle2_fast.adapters.open_clip")
    assert done.returncode != 0 and "open_clip.loss: expected ClipLoss and SigLipLoss" in done.stderr
    assert "['" not in done.stdout


def test_open_clip_is_missing(monkeypatch):
    """Catches: a ModuleNotFoundError that does not say what to install."""

    def absent(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name="open_clip")

    monkeypatch.setattr(open_clip, "import_module", absent)
    with pytest.raises(ImportError, match="needs the package open_clip"):
        open_clip.use_losses()


def test_chunk_size_of_later_versions_is_accepted():
    """Catches: a TypeError from open_clip's own call."""
    assert SigLipLoss(rank=0, world_size=1, dist_impl=None, chunk_size=512).dist_impl == "bidir"
