"""Philox against its published vectors; noise that depends on seed, step and element only; add_noise."""

from __future__ import annotations

import math

import pytest
import torch

from dalle2_fast import functional, reference
from dalle2_fast.ops.noise import box_muller

# Known answers of Philox4x32-10 published with the Random123 library: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize("counter, key, result", VECTORS)
def test_philox_known_answers(counter, key, result):
    actual = reference.philox_4x32_10(words(counter), words(key))
    assert [int(word) for word in actual] == [int(word) for word in words(result)]


def scalar_noise(seed, step, element):
    """One number, in Python integers and floats: an independent reading of the layout that is documented."""
    mask = 0xFFFFFFFF
    c = [(element // 4) & mask, (element // 4) >> 32, step & mask, step >> 32]
    k = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    pair = element % 4 // 2
    radius = math.sqrt(-2 * math.log(c[2 * pair] * 2.0**-32 + 2.0**-33))
    angle = 2 * math.pi * c[2 * pair + 1] * 2.0**-32
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


@pytest.mark.parametrize("step", [0, 3, 2**40 + 5])
def test_noise_is_the_documented_number(step):
    # Catches: halves of seed or step dropped, sign extension of negative seeds, elements in another order.
    seeds = torch.tensor([0, 1, -1, 2**62 + 3, -(2**40) - 7])
    noise = functional.sample_noise(seeds, step, (5, 3, 7), dtype=torch.float64).flatten(1)
    for row, seed in enumerate(seeds.tolist()):
        expected = [scalar_noise(seed, step, element) for element in range(21)]
        torch.testing.assert_close(
            noise[row], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
        )


def test_a_sample_does_not_depend_on_its_batch_mates_or_on_what_follows():
    seeds = torch.tensor([5, -9, 123456789012345])
    batch = functional.sample_noise(seeds, 2, (3, 2, 5, 5))
    for index in range(3):
        alone = functional.sample_noise(seeds[index : index + 1], 2, (1, 2, 5, 5))
        assert torch.equal(batch[index], alone[0])
    longer = functional.sample_noise(seeds, 2, (3, 64))
    assert torch.equal(longer[:, :50], batch.flatten(1))


def test_step_as_tensor_and_dtypes_agree():
    seeds = torch.tensor([1, 2])
    noise = functional.sample_noise(seeds, 9, (2, 1001))
    assert torch.equal(noise, functional.sample_noise(seeds, torch.tensor(9), (2, 1001)))
    double = functional.sample_noise(seeds, 9, (2, 1001), dtype=torch.float64)
    torch.testing.assert_close(noise.double(), double, rtol=1e-5, atol=2e-6)
    half = functional.sample_noise(seeds, 9, (2, 1001), dtype=torch.bfloat16)
    assert torch.equal(half, noise.bfloat16())


def test_noise_is_standard_normal():
    # 2^18 numbers: the standard errors are 0.002 (mean), 0.0014 (deviation), 0.01 (fourth moment).
    x = functional.sample_noise(torch.arange(4), 0, (4, 2**16), dtype=torch.float64)
    assert abs(x.mean()) < 0.008 and abs(x.std() - 1) < 0.006 and abs((x**4).mean() - 3) < 0.06
    uniform = torch.special.ndtr(x).flatten().sort().values
    distance = (uniform - torch.linspace(0, 1, uniform.numel(), dtype=torch.float64)).abs().max()
    assert distance < 1.95 / math.sqrt(uniform.numel())  # Kolmogorov-Smirnov at 0.1 %


def test_the_rarest_words_give_finite_numbers():
    # Catches: log(0), once in 2^32 draws.
    rare = torch.tensor([0, 2**32 - 1])
    for dtype in (torch.float32, torch.float64):
        cosine, _ = box_muller(rare, torch.zeros_like(rare), dtype)
        torch.testing.assert_close(cosine, torch.tensor([6.7637, 0.0], dtype=dtype), rtol=0, atol=1e-4)


def test_noise_is_uncorrelated_between_seeds_steps_and_neighbours():
    n = 2**14
    rows = [functional.sample_noise(torch.arange(3), step, (3, n)) for step in range(3)]
    rows = torch.cat(rows)
    rows = torch.cat((rows, rows.roll(1, dims=1)))
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5.5 / math.sqrt(n)


def test_empty_noise():
    seeds = torch.arange(2)
    assert functional.sample_noise(seeds[:0], 0, (0, 3)).shape == (0, 3)
    assert functional.sample_noise(seeds, 0, (2, 0)).shape == (2, 0)
    assert functional.sample_noise(seeds, 0, (2,)).shape == (2,)


def test_add_noise_is_its_formula_and_differentiable():
    torch.manual_seed(0)
    x0 = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(3, dtype=torch.float64, requires_grad=True)
    sigma = torch.rand(3, dtype=torch.float64, requires_grad=True)
    x_t, same = functional.add_noise(x0, alpha, sigma, noise)
    expected = alpha[:, None, None] * x0 + sigma[:, None, None] * noise
    torch.testing.assert_close(x_t, expected, rtol=0, atol=1e-15)
    assert same is noise
    assert torch.autograd.gradcheck(lambda *a: functional.add_noise(*a)[0], (x0, alpha, sigma, noise))


def test_add_noise_rounds_once():
    x0 = torch.randn(64, 33).bfloat16()
    alpha, sigma = torch.rand(64), torch.rand(64)
    x_t, noise = functional.add_noise(x0, alpha, sigma, seeds=torch.arange(64), step=4)
    assert noise.dtype == x_t.dtype == torch.bfloat16
    exact = alpha.double()[:, None] * x0.double() + sigma.double()[:, None] * noise.double()
    assert ((x_t.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()


def test_add_noise_draws_by_seed():
    x0, one = torch.randn(3, 5), torch.ones(3)
    seeds = torch.tensor([7, 8, 9])
    x_t, noise = functional.add_noise(x0, one, one, seeds=seeds, step=2)
    assert torch.equal(noise, functional.sample_noise(seeds, 2, (3, 5)))
    assert torch.equal(x_t, x0 + noise)


SEEDS = torch.arange(2)
X0, ONES = torch.zeros(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    "kind, message, seeds, step, shape, dtype",
    [
        (TypeError, "seeds: expected torch.int64, got torch.int32", SEEDS.int(), 0, (2, 3), torch.float32),
        (ValueError, r"seeds: expected \[B\] = \(3,\), got \(2,\)", SEEDS, 0, (3, 3), torch.float32),
        (TypeError, "seeds: expected a torch.Tensor, got int", 5, 0, (1, 3), torch.float32),
        (ValueError, "step: expected 0 <= step < .* got -1", SEEDS, -1, (2, 3), torch.float32),
        (TypeError, "step: expected an int or an int64 scalar tensor, got float",
         SEEDS, 1.0, (2, 3), torch.float32),
        (TypeError, "step: expected torch.int64, got torch.float32",
         SEEDS, torch.tensor(1.0), (2, 3), torch.float32),
        (ValueError, r"step: expected a scalar, got \(2,\)", SEEDS, SEEDS, (2, 3), torch.float32),
        (ValueError, r"shape: expected \(B, ...\) of sizes >= 0, got \(\)", SEEDS, 0, (), torch.float32),
        (TypeError, "dtype: expected a floating-point torch.dtype, got torch.int64",
         SEEDS, 0, (2, 3), torch.int64),
    ],
)  # fmt: skip
def test_sample_noise_errors(kind, message, seeds, step, shape, dtype):
    with pytest.raises(kind, match=message):
        functional.sample_noise(seeds, step, shape, dtype=dtype)


@pytest.mark.parametrize(
    "kind, message, kwargs",
    [
        (ValueError, "noise, seeds: expected exactly one of the two, got neither", {}),
        (ValueError, "noise, seeds: expected exactly one .* got both", {"noise": X0, "seeds": SEEDS}),
        (ValueError, r"noise: expected \[B, ...\] = \(2, 3\), got \(2, 4\)", {"noise": torch.zeros(2, 4)}),
        (ValueError, r"alpha: expected \[B\] = \(2,\), got \(3,\)", {"noise": X0, "alpha": torch.ones(3)}),
        (TypeError, "sigma: expected a torch.Tensor, got float", {"noise": X0, "sigma": 1.0}),
        (ValueError, r"seeds: expected \[B\] = \(2,\), got \(1,\)", {"seeds": SEEDS[:1]}),
    ],
)
def test_add_noise_errors(kind, message, kwargs):
    with pytest.raises(kind, match=message):
        functional.add_noise(**{"x0": X0, "alpha": ONES, "sigma": ONES, **kwargs})
