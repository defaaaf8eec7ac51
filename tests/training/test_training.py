"""The loop, the average and the stage folder, on a toy problem. Each test names the fault it would catch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle2_fast.training import muon
from dalle2_fast.training.ema import ExponentialMovingAverage
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder, write_file
from dalle2_fast.training.muon import Muon, polar_factor, polar_factors
from dalle2_fast.training.optimisers import Optimisation, make_optimizers
from dalle2_fast.training.presets import PRESETS, get_preset
from dalle2_fast.training.recipes import STAGES, adjust
from dalle2_fast.training.stages.protocol import Validation
from dalle2_fast.training.trainer import Trainer
from dalle2_fast.training.weights import load_weights, save_weights


class Toy:
    """Regression with dropout (torch's own generator), noise (the given one) and a batch of the step."""

    name = "toy"

    def __init__(self, bad_step: int | None = None, stop_step: int | None = None, bad: float = float("nan")):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.config = {"model": {"width": 8}}
        self.bad_step, self.stop_step, self.bad = bad_step, stop_step, bad

    def batch(self, step):
        if step == self.stop_step:
            raise KeyboardInterrupt  # as abrupt as a kill: nothing is saved on the way out
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        return {"x": x * (self.bad if step == self.bad_step else 1.0)}

    def loss(self, batch, generator):
        noise = 0.1 * torch.randn(4, 1, generator=generator)
        return (self.model(batch["x"]) - batch["x"].sum(1, keepdim=True) + noise).square().mean()

    def validate(self):
        return Validation({"chance": torch.rand(()).item()}, torch.rand(4, 3, 8, 8), columns=2)


def toy_trainer(path, stage=None, seed=0, **options) -> Trainer:
    options = dict(batch_size=4, steps=30, warmup_steps=4, log_steps=5, first_pictures=8) | options
    folder = StageFolder(path)
    folder.prepare()
    trainer = Trainer(stage or Toy(), Optimisation(**options), folder, seed=seed, show_progress=False)
    if folder.has_state():
        trainer.resume()
    return trainer


def log_rows(path) -> list[dict]:
    return [json.loads(line) for line in (Path(path) / "log.jsonl").read_text().splitlines()]


def assert_same_state(a: Trainer, b: Trainer) -> None:
    a, b = a.state, b.state
    for ours, theirs in ((a.model.state_dict(), b.model.state_dict()), (a.ema.average, b.ema.average)):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resume_after_a_kill_is_bit_identical(tmp_path):
    """Catches: randomness that is not a function of (seed, step), optimiser or EMA state not saved."""
    whole = toy_trainer(tmp_path / "whole")
    assert whole.train() == "finished"
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path / "cut", Toy(stop_step=17), save_steps=7).train()
    resumed = toy_trainer(tmp_path / "cut", save_steps=7)
    assert resumed.state.step == 14
    assert resumed.train() == "finished"
    assert_same_state(whole, resumed)
    first, second = log_rows(tmp_path / "whole"), log_rows(tmp_path / "cut")
    assert [row["step"] for row in first] == [5, 8, 10, 15, 16, 20, 25, 30]
    assert [row["step"] for row in second] == [
        row["step"] for row in first
    ]  # undone lines do not appear twice
    assert first[-1]["loss"] == second[-1]["loss"]
    assert (tmp_path / "cut" / "samples" / "step-0000016.png").stat().st_size > 0


def test_another_seed_trains_another_model(tmp_path):
    """Catches: a seed that is accepted and ignored."""
    a, b = toy_trainer(tmp_path / "a", seed=0, steps=3), toy_trainer(tmp_path / "b", seed=1, steps=3)
    a.train(), b.train()
    assert not torch.equal(a.state.model[0].weight, b.state.model[0].weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_loss_stops_and_keeps_the_last_good_state(tmp_path, bad):
    """Catches: training on after NaN, or saving the broken weights over the good ones."""
    with pytest.raises(TrainingError, match="not finite near step 12.*state.pt"):
        toy_trainer(tmp_path, Toy(bad_step=12, bad=bad), save_steps=5).train()
    resumed = toy_trainer(tmp_path)
    assert resumed.state.step == 10
    assert all(value.isfinite().all() for value in resumed.state.model.state_dict().values())


def test_non_finite_first_step_leaves_a_state(tmp_path):
    """Catches: a message that names a state which was never written."""
    with pytest.raises(TrainingError, match="not finite near step 0"):
        toy_trainer(tmp_path, Toy(bad_step=0)).train()
    assert toy_trainer(tmp_path).state.step == 0


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
    """Catches: a window in which no state is found, and half files that stay for ever."""
    toy_trainer(tmp_path, steps=10, save_steps=5).train()
    os.replace(tmp_path / "state.pt", tmp_path / "state.previous.pt")  # what such a kill leaves behind
    (tmp_path / ".state.pt.123.partial").write_bytes(b"half")
    (tmp_path / "state.pt.partial").write_bytes(b"half, of the previous release")
    resumed = toy_trainer(tmp_path, steps=20)
    assert resumed.state.step == 10
    assert not list(tmp_path.glob("*.partial"))


def test_damaged_state_is_named(tmp_path):
    """Catches: a traceback from the unpickler, or silently starting anew."""
    toy_trainer(tmp_path, steps=4, save_steps=2).train()
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:500])
    with pytest.raises(TrainingError, match="damaged training state.*state.previous.pt"):
        toy_trainer(tmp_path)


def test_resume_of_another_model_or_seed_says_what_differs(tmp_path):
    """Catches: weights of one configuration poured into another."""
    toy_trainer(tmp_path, steps=2).train()
    other = Toy()
    other.config = {"model": {"width": 9}}
    with pytest.raises(TrainingError, match="config differs: model.width: expected 9, got 8"):
        toy_trainer(tmp_path, other)
    with pytest.raises(TrainingError, match="seed differs: expected 5, got 0"):
        toy_trainer(tmp_path, seed=5)


def test_unwritable_folder(tmp_path):
    """Catches: finding out after an hour. A file stands where the folder should be (works for root, too)."""
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(TrainingError, match="--out: cannot write to .*out"):
        StageFolder(tmp_path / "out" / "clip").prepare()


def test_sigterm_saves_and_stops(tmp_path):
    """Catches: a terminated run that loses its work. Signals need a process of their own."""
    program = textwrap.dedent(f"""
        from tests.training.test_training import toy_trainer
        print("go", flush=True)
        print(toy_trainer({str(tmp_path)!r}, steps=10**9, log_steps=100, first_pictures=2**40).train())
    """)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "go\n"
    deadline = time.monotonic() + 30
    while not (tmp_path / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert output == "interrupted by SIGTERM\n"
    assert process.returncode == 0
    assert toy_trainer(tmp_path, steps=10**9).state.step >= 100


def test_minutes_follow_the_clock_and_survive_a_pause(tmp_path):
    """Catches: a budget that starts again at each resume, and a run without its last log line."""
    options = dict(steps=None, minutes=0.02, log_steps=10**6, first_pictures=2**40)
    first = toy_trainer(tmp_path, **options)
    assert first.train(pause_after=0.008) == "paused"
    assert 0.48 <= first.state.elapsed < 1.1
    second = toy_trainer(tmp_path, **options)
    assert second.state.elapsed == first.state.elapsed
    assert second.train() == "finished"
    assert 1.2 <= second.state.elapsed < 1.9
    row = log_rows(tmp_path)[-1]
    assert row["step"] == second.state.step > first.state.step
    assert row["lr"] < 0.1 * Optimisation(batch_size=1, steps=1).learning_rate
    assert "chance" in row


def test_learning_rate():
    """Catches: a schedule that starts at zero, overshoots or ends elsewhere than at final_fraction."""
    options = Optimisation(batch_size=1, steps=100, learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    rates = [options.rate(step, options.progress(step, 0.0)) for step in range(101)]
    assert 0 < rates[0] <= 0.2
    assert max(rates) < 2.0
    assert rates[9] == max(rates)
    assert rates[100] == pytest.approx(0.2)
    assert rates[50] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    options = Optimisation(
        batch_size=1, steps=100, learning_rate=2.0, warmup_steps=0, hold=0.6, decay="linear"
    )
    assert [options.rate(9, progress) for progress in (0.0, 0.6)] == [2.0, 2.0]
    assert options.rate(9, 0.8) == pytest.approx(2.0 * (0.02 + 0.98 * 0.5))


def test_ema_is_the_stated_recursion_and_warms_up():
    """Catches: a missing warm-up (the random start stays), integer buffers averaged as floats."""
    model = nn.BatchNorm1d(2)
    ema = ExponentialMovingAverage(model, decay=0.5)
    expected = model.weight.detach().double().clone()
    for step in range(20):
        with torch.no_grad():
            model.weight.fill_(float(step))
            model.num_batches_tracked.fill_(step)
        decay = min(0.5, (1 + step) / (10 + step))
        assert ema.current_decay() == decay
        ema.update(model)
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.average["weight"].double(), expected)
    assert ema.average["num_batches_tracked"].item() == 19
    with ema.applied_to(model) as averaged:
        assert not averaged.training
        torch.testing.assert_close(averaged.weight.double(), expected)
    assert model.training
    assert model.weight[0].item() == 19.0
    with pytest.raises(ValueError, match="decay: expected"):
        ExponentialMovingAverage(model, decay=1.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_has_one_optimiser_and_free_ones_no_decay(name):
    """Catches: decaying norms, biases or embeddings; a parameter in no group or in two."""
    parts = {"table": nn.Embedding(3, 4), "conv_in": nn.Conv2d(4, 4, 3), "linear": nn.Linear(4, 4)}
    model = nn.ModuleDict(parts | {"norm": nn.LayerNorm(4)})
    model.register_parameter("positional_embedding", nn.Parameter(torch.zeros(3, 4)))
    optimizers = make_optimizers(model, Optimisation(batch_size=1, steps=1, optimizer=name, weight_decay=0.3))
    groups = [group for each in optimizers for group in each.param_groups]
    counted = sorted(id(p) for group in groups for p in group["params"])
    assert counted == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model["linear"].weight), id(model["conv_in"].weight)}
    if name == "muon":
        assert [id(p) for p in optimizers[0].param_groups[0]["params"]] == [id(model["linear"].weight)]


def test_muon_resumes_bit_identically_and_learns(tmp_path):
    """Catches: momentum of the second optimiser not saved."""
    options = dict(optimizer="muon", learning_rate=0.02)
    whole = toy_trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path / "cut", Toy(stop_step=17), save_steps=7, **options).train()
    with pytest.raises(TrainingError, match="optimizer differs: expected 'adamw', got 'muon'"):
        toy_trainer(tmp_path / "cut")
    resumed = toy_trainer(tmp_path / "cut", **options)
    resumed.train()
    assert_same_state(whole, resumed)
    rows = log_rows(tmp_path / "whole")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_polar_factor_levels_singular_values(shape):
    """Catches: an iteration that diverges, or mixes up the sides of a tall matrix."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    factor = polar_factor(matrix)
    inner = (left.T @ factor @ right.T).diagonal()
    assert inner[values > 0.05 * values.max()].min() > 0.6
    assert torch.linalg.svdvals(factor).max() < 1.3


def test_muon_in_stacks_equals_one_by_one(monkeypatch):
    """Catches: a stack that mixes up matrices or sides, or has one norm; a stack of two shapes."""
    shapes = [(12, 40), (40, 12), (12, 4, 5, 2), (12, 40), (16, 16), (40, 3, 2, 2), (16, 16), (7, 9)]
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) * 3.0**i for i, shape in enumerate(shapes)]
    factors = polar_factors([start[i].flatten(1) for i in (0, 1, 2, 3, 5)])
    for factor, i in zip(factors, (0, 1, 2, 3, 5), strict=True):
        torch.testing.assert_close(factor, polar_factor(start[i].flatten(1)), rtol=0, atol=1e-6)

    def run(stacked: bool) -> list[torch.Tensor]:
        with monkeypatch.context() as patch:
            sizes = []
            if stacked:
                patch.setattr(muon, "alone", lambda parameter: False)
                whole = muon.polar_factors
                count = lambda matrices: sizes.append(len(matrices)) or whole(matrices)  # noqa: E731
                patch.setattr(muon, "polar_factors", count)
            parameters = [nn.Parameter(each.clone()) for each in start]
            optimizer, noise = Muon(parameters, lr=0.1, weight_decay=0.1), torch.Generator().manual_seed(1)
            for _ in range(3):
                for parameter in parameters:
                    parameter.grad = torch.randn(parameter.shape, generator=noise)
                parameters[3].grad = None
                optimizer.step()
        assert sorted(sizes) == (sorted([4, 2, 1] * 3) if stacked else [])
        assert all(set(state) == {"momentum"} for state in optimizer.state_dict()["state"].values())
        return [parameter.detach() for parameter in parameters]

    for one, many in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-6)


def test_weights_file_round_trip_and_damage(tmp_path):
    """Catches: a configuration that parts from its weights; a traceback for a cut file."""
    path = tmp_path / "model.safetensors"
    save_weights(path, {"model": {"dim": 3}}, {"w": torch.arange(6.0).view(2, 3).T})
    config, tensors = load_weights(path)
    assert config == {"model": {"dim": 3}}
    assert torch.equal(tensors["w"], torch.arange(6.0).view(2, 3).T)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TrainingError, match="model.safetensors: not a readable weights file"):
        load_weights(path)


def test_presets():
    """Catches: an unknown name that is not answered with the known ones, and wishes that are dropped."""
    with pytest.raises(
        ValueError, match="--preset: expected one of scenes-cpu, scenes-gpu, tiny, got 'scenes'"
    ):
        get_preset("scenes")
    preset = PRESETS["scenes-cpu"]
    shorter = adjust(preset, STAGES, minutes=12.0)
    assert sum(shorter.recipe(stage).optimisation.minutes for stage in STAGES) == pytest.approx(12.0)
    stepped = adjust(preset, ("clip",), steps=7, batch_size=3, learning_rate=0.5)
    options = stepped.clip.optimisation
    assert (options.steps, options.batch_size, options.learning_rate) == (7, 3, 0.5)
    assert stepped.prior == preset.prior
    assert adjust(PRESETS["tiny"], ("clip",), minutes=1.0).clip.optimisation.steps is None


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"learning_rate": -1.0}, {"steps": 0}, {"minutes": 0.0}]
)
def test_ranges(wrong):
    """Catches: numbers that would fail deep inside, or never end."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a number above 0"):
        Optimisation(**({"batch_size": 1, "steps": 1} | wrong))
