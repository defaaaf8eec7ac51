"""A toy stage and a trainer for it: a run takes a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from dalle2_fast.training.folder import StageFolder
from dalle2_fast.training.recipes import Optimisation
from dalle2_fast.training.stages.protocol import Validation
from dalle2_fast.training.trainer import Trainer


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


def toy_trainer(path, stage=None, seed=0, graphs=None, device="cpu", **options) -> Trainer:
    options = dict(batch_size=4, steps=30, warmup_steps=4, log_steps=5, first_validation=8) | options
    folder = StageFolder(path)
    folder.prepare()
    trainer = Trainer(
        stage or Toy(), Optimisation(**options), folder, seed=seed, device=device, show_progress=False,
        graphs=graphs,
    )  # fmt: skip
    if folder.has_state():
        trainer.resume()
    return trainer


def log_rows(path) -> list[dict]:
    return [json.loads(line) for line in (Path(path) / "log.jsonl").read_text().splitlines()]


def assert_same_state(a: Trainer, b: Trainer) -> None:
    a, b = a.state, b.state
    for ours, theirs in ((a.model.state_dict(), b.model.state_dict()), (a.ema.average, b.ema.average)):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
