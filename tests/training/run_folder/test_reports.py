"""The log for TensorBoard and Weights & Biases. Each test names the fault it would catch."""

from __future__ import annotations

import importlib.util
import types

import pytest
from PIL import Image

from dalle2_fast.training.run_folder.reports import choose_reports, open_reports

ROW = {"step": 20, "seconds": 3.5, "samples": 640, "images_per_s": 7.2, "loss": 0.5}


def test_which_reports(monkeypatch):
    """Catches: a report that nobody asked for, a package that is missing an hour later."""
    installed = {"tensorboard"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert choose_reports(None) == ("tensorboard",)
    assert choose_reports(["none"]) == ()
    assert choose_reports(["tensorboard", "tensorboard"]) == ("tensorboard",)
    with pytest.raises(ImportError, match="--report-to wandb: wandb is not installed: pip install wandb"):
        choose_reports(["wandb"])
    for wrong in (["mlflow"], ["none", "tensorboard"]):
        with pytest.raises(ValueError, match="--report-to: expected none, or some of tensorboard"):
            choose_reports(wrong)
    installed.clear()
    assert choose_reports(None) == ()


def test_tensorboard_has_each_step_once(tmp_path):
    """Catches: steps that a kill undid and that appear twice, numbers and images that are missing."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = tmp_path / "step.png"
    Image.new("RGB", (6, 4), "red").save(picture)
    for start, loss in ((0, 0.5), (20, 0.25)):
        (report,) = open_reports(["tensorboard"], tmp_path, stage="clip", settings={"seed": 3}, step=start)
        for step in (20, 40):
            if step > start:
                report.add(ROW | {"step": step, "loss": loss}, picture)
        report.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(20, 0.5), (40, 0.25)]
    assert set(events.Tags()["scalars"]) == {"images_per_s", "loss"}
    assert events.Images("samples")[0].width == 6
    assert "seed: 3" in str(events.Tensors("clip/settings/text_summary")[0])


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    """Catches: a resumed stage as another run, a new one that continues an old one's curves."""
    calls, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    names = iter("abc")
    library = types.SimpleNamespace(
        init=lambda **options: calls.append(options) or run,
        util=types.SimpleNamespace(generate_id=lambda: next(names)),
        Image=lambda path: path,
    )
    monkeypatch.setitem(__import__("sys").modules, "wandb", library)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for step in (0, 20, 0):
        (report,) = open_reports(["wandb"], tmp_path, stage="clip", settings={"seed": 3}, step=step)
        report.add(ROW, tmp_path / "x.png")
        report.close()
    assert [call["id"] for call in calls] == ["a", "a", "b"]
    assert (calls[0]["project"], calls[0]["name"], calls[0]["config"]) == ("mine", "clip", {"seed": 3})
    values = {name: value for name, value in ROW.items() if name != "step"}
    assert logged[0] == (20, values | {"images": str(tmp_path / "x.png")})
