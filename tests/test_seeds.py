"""Derived seeds: distinct, in range, and the same numbers as in every earlier version."""

from __future__ import annotations

import torch

from dalle2_fast.seeds import derived_seeds, mix_seed, sample_seed


def test_mixed_seeds_differ():
    seeds = {mix_seed(seed, step) for seed in range(40) for step in range(40)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(0, 1) != mix_seed(1, 0)


def test_seeds_of_training_steps_are_distinct():
    """Catches: seed + step, where run 1 repeats run 0 one step later; noise with the numbers of the data."""
    noise = {mix_seed(seed, step, 1) for seed in range(50) for step in range(50)}
    data = {mix_seed(seed, step) for seed in range(50) for step in range(50)}
    assert len(noise | data) == 5000
    assert all(0 <= mix_seed(seed, 3, 1) < 2**63 for seed in (0, 1, 2**40))


def test_the_numbers_stay():
    """Catches: another mixer, after which the same seed draws other images and trains on other data."""
    assert mix_seed(3, 5) == 3157420706888720564
    assert [sample_seed(3, index) for index in (-1, 0, 1)] == [
        -2886753501206757670, -3405980900428447358, 8025981027033294737,
    ]  # fmt: skip
    seeds = torch.tensor([7, -1])
    assert derived_seeds(seeds, 2).tolist() == [4354685564936845357, -4354685564936845355]
    assert derived_seeds(seeds, torch.tensor(2)).tolist() == derived_seeds(seeds, 2).tolist()
    assert torch.equal(derived_seeds(seeds, 0), seeds)
