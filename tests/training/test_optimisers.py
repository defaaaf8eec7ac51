"""Learning rate, average, groups of parameters, Muon. Each test names the fault it would catch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dalle2_fast.training import muon
from dalle2_fast.training.ema import ExponentialMovingAverage
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.muon import Muon, polar_factor, polar_factors
from dalle2_fast.training.optimisers import make_optimizers
from dalle2_fast.training.recipes import Optimisation
from tests.support.toy_training import Toy, assert_same_state, log_rows, toy_trainer


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"learning_rate": -1.0}, {"steps": 0}, {"minutes": 0.0}]
)
def test_ranges(wrong):
    """Catches: numbers that would fail deep inside, or never end."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a number above 0"):
        Optimisation(**({"batch_size": 1, "steps": 1} | wrong))


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
                patch.setattr(muon, "updated_alone", lambda parameter: False)
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
