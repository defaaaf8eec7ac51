"""The loop, on a toy problem. Each test names the fault it would catch."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.recipes import Optimisation
from tests.support.toy_training import Toy, assert_same_state, log_rows, toy_trainer


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


def test_a_log_line_covers_the_steps_before_a_kill(tmp_path):
    """Catches: a mean over the steps after the resume alone; a last line without a loss, if the kill comes
    between the last state and that line."""
    toy_trainer(tmp_path / "whole").train()
    for save_steps, stop_step in ((7, 17), (30, None)):
        out = tmp_path / str(save_steps)
        trainer = toy_trainer(out, Toy(stop_step=stop_step), save_steps=save_steps)
        if stop_step is None:  # killed in its last line
            trainer._validate = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
            trainer.options = dataclasses.replace(trainer.options, first_validation=2**40)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        resumed = toy_trainer(out)
        assert resumed.state.step == (14 if stop_step else 30)
        resumed.train()
        columns = ("step", "loss", "grad_norm", "lr", "samples")
        rows = [[{name: row[name] for name in columns} for row in log_rows(path)]
                for path in (tmp_path / "whole", out)]  # fmt: skip
        assert rows[1][-1] == rows[0][-1]
        assert stop_step is None or rows[1] == rows[0]
    longer = toy_trainer(tmp_path / "whole", steps=31)
    assert longer.state.window.steps == 0, "steps that are logged would be counted once more"


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


def test_resume_of_another_model_or_seed_says_what_differs(tmp_path):
    """Catches: weights of one configuration loaded into a model of another."""
    toy_trainer(tmp_path, steps=2).train()
    other = Toy()
    other.config = {"model": {"width": 9}}
    with pytest.raises(TrainingError, match="config differs: model.width: expected 9, got 8"):
        toy_trainer(tmp_path, other)
    with pytest.raises(TrainingError, match="seed differs: expected 5, got 0"):
        toy_trainer(tmp_path, seed=5)


def test_sigterm_saves_and_stops(tmp_path):
    """Catches: a terminated run that loses its work. Signals need a process of their own."""
    program = textwrap.dedent(f"""
        from tests.support.toy_training import toy_trainer
        print("go", flush=True)
        print(toy_trainer({str(tmp_path)!r}, steps=10**9, log_steps=100, first_validation=2**40).train())
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
    options = dict(steps=None, minutes=0.02, log_steps=10**6, first_validation=2**40)
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
