"""diffusion_step against the update formulas of DDPM, DDIM and DPM-Solver++(2M), written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dalle2_fast import functional

# A cosine schedule at three times, from noisy to clean: x_t has (ALPHA[t], SIGMA[t]).
ALPHA = [math.cos(angle) for angle in (1.2, 0.9, 0.4)]
SIGMA = [math.sin(angle) for angle in (1.2, 0.9, 0.4)]
B, C = 3, 2
SEEDS = torch.tensor([3, -4, 5])


def row(alpha=ALPHA[0], sigma=SIGMA[0], a=0.3, b=0.6, c=0.0, std=0.0, low=-4.0, high=-1.0):
    return [alpha, sigma, a, b, c, std, low, high]


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


X, X0, OUT = draw(B, C, 4, 3), 0.7 * draw(B, C, 4, 3).flip(0), draw(B, C, 4, 3).roll(1, 2)
close = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_x0_from_every_prediction(prediction):
    # With the true epsilon, x0 or v of x = alpha x0 + sigma epsilon, every prediction must give x0 back.
    noise = OUT
    x = ALPHA[0] * X0 + SIGMA[0] * noise
    output = {"epsilon": noise, "sample": X0, "v_prediction": ALPHA[0] * noise - SIGMA[0] * X0}[prediction]
    x_next, x0 = functional.diffusion_step(x, output, table(row()), 0, prediction=prediction)
    torch.testing.assert_close(x0, X0, **close)
    torch.testing.assert_close(x_next, 0.3 * x + 0.6 * X0, **close)


def test_ddpm_is_the_gaussian_posterior():
    # q(x_s | x_t, x0) by Bayes' rule from q(x_s | x0) and q(x_t | x_s), weighted by their precisions.
    alpha_ts = ALPHA[0] / ALPHA[1]
    variance_ts = SIGMA[0] ** 2 - (alpha_ts * SIGMA[1]) ** 2
    precision = 1 / SIGMA[1] ** 2 + alpha_ts**2 / variance_ts
    a, b = alpha_ts / variance_ts / precision, ALPHA[1] / SIGMA[1] ** 2 / precision
    std = precision**-0.5
    x_next, x0 = functional.diffusion_step(X, OUT, table(row(a=a, b=b, std=std)), 0, seeds=SEEDS)
    noise = functional.sample_noise(SEEDS, 0, X.shape, dtype=torch.float64)
    x0 = (X - SIGMA[0] * OUT) / ALPHA[0]
    mean = (ALPHA[1] / SIGMA[1] ** 2 * x0 + alpha_ts / variance_ts * X) / precision
    torch.testing.assert_close(x_next, mean + std * noise, **close)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim(eta):
    # Song et al., equation 12, with the epsilon that belongs to the clipped x0.
    std = eta * math.sqrt(SIGMA[1] ** 2 / SIGMA[0] ** 2) * math.sqrt(1 - (ALPHA[0] / ALPHA[1]) ** 2)
    direction = math.sqrt(SIGMA[1] ** 2 - std**2)
    a = direction / SIGMA[0]
    steps = table(row(), row(a=a, b=ALPHA[1] - a * ALPHA[0], std=std))
    x_next, x0 = functional.diffusion_step(X, OUT, steps, 1, seeds=SEEDS, clip=0.8)
    expected_x0 = ((X - SIGMA[0] * OUT) / ALPHA[0]).clamp(-0.8, 0.8)
    epsilon = (X - ALPHA[0] * expected_x0) / SIGMA[0]
    noise = functional.sample_noise(SEEDS, 1, X.shape, dtype=torch.float64)
    torch.testing.assert_close(x0, expected_x0, **close)
    torch.testing.assert_close(x_next, ALPHA[1] * x0 + direction * epsilon + std * noise, **close)


def test_dpm_solver_2m():
    # Lu et al., algorithm 2, from the second to the third time, with x0 of the first.
    log_snr = [math.log(alpha / sigma) for alpha, sigma in zip(ALPHA, SIGMA, strict=True)]
    h, h_last = log_snr[2] - log_snr[1], log_snr[1] - log_snr[0]
    half_inverse_ratio = h / (2 * h_last)
    weight = ALPHA[2] * -math.expm1(-h)
    a, b, c = SIGMA[2] / SIGMA[1], weight * (1 + half_inverse_ratio), -weight * half_inverse_ratio
    steps = table(row(ALPHA[1], SIGMA[1], a, b, c))
    x_next, _ = functional.diffusion_step(X, OUT, steps, 0, prediction="sample", previous_x0=X0)
    combined = (1 + half_inverse_ratio) * OUT - half_inverse_ratio * X0
    expected = SIGMA[2] / SIGMA[1] * X - ALPHA[2] * math.expm1(-h) * combined
    torch.testing.assert_close(x_next, expected, **close)

    first, _ = functional.diffusion_step(X, OUT, steps, 0, prediction="sample")
    torch.testing.assert_close(first, a * X + (b + c) * OUT, **close)


@pytest.mark.parametrize("guidance", [3.0, torch.tensor(3.0), torch.tensor([3.0, 1.0, 0.0])])
def test_guidance(guidance):
    # Catches: conditional and unconditional rows exchanged; the unconditional weight off by one.
    both = torch.cat((OUT, X0))
    _, x0 = functional.diffusion_step(X, both, table(row()), 0, guidance=guidance, prediction="sample")
    per_sample = torch.as_tensor(guidance, dtype=torch.float64).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x0, per_sample * OUT + (1 - per_sample) * X0, **close)


def test_guidance_rescale():
    both = torch.cat((OUT, X0))
    arguments = {"guidance": 4.0, "prediction": "sample"}
    _, plain = functional.diffusion_step(X, both, table(row()), 0, **arguments)
    _, full = functional.diffusion_step(X, both, table(row()), 0, guidance_rescale=1.0, **arguments)
    _, part = functional.diffusion_step(X, both, table(row()), 0, guidance_rescale=0.7, **arguments)
    torch.testing.assert_close(full.flatten(1).std(1), OUT.flatten(1).std(1), **close)
    torch.testing.assert_close(part, 0.7 * full + 0.3 * plain, **close)


@pytest.mark.parametrize("guided", [False, True])
def test_learned_range(guided):
    low, high = -4.0, -1.0
    position = torch.cat((torch.full((B, 1, 4, 3), -1.0), torch.full((B, 1, 4, 3), 0.5)), 1).double()
    output = torch.cat((OUT, position), 1)
    arguments = {"prediction": "sample", "learned_range": True, "seeds": SEEDS}
    if guided:  # the unconditional variance is noise that must not be read
        output = torch.cat((output, torch.cat((OUT, 100 * position), 1)))
        arguments["guidance"] = 2.0
    steps = table(row(std=1.0, low=low, high=high), row(std=0.0, low=low, high=high))
    x_next, x0 = functional.diffusion_step(X, output, steps, 0, **arguments)
    noise = functional.sample_noise(SEEDS, 0, X.shape, dtype=torch.float64)
    log_var = torch.tensor([low, 0.75 * high + 0.25 * low], dtype=torch.float64).view(1, 2, 1, 1)
    torch.testing.assert_close(x0, OUT, **close)
    torch.testing.assert_close(x_next, 0.3 * X + 0.6 * OUT + (log_var / 2).exp() * noise, **close)

    last, _ = functional.diffusion_step(X, output, steps, 1, **arguments)
    torch.testing.assert_close(last, 0.3 * X + 0.6 * OUT, **close)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold(p, clip):
    output = OUT * torch.tensor([0.01, 1.0, 10.0], dtype=torch.float64).view(3, 1, 1, 1)
    _, x0 = functional.diffusion_step(
        X, output, table(row()), 0, prediction="sample", dynamic_threshold=p, clip=clip
    )
    bound = clip or 1.0
    limit = torch.quantile(output.flatten(1).abs(), p, dim=1).clamp_min(bound).view(3, 1, 1, 1)
    torch.testing.assert_close(x0, output.clamp(-limit, limit) / limit * bound, **close)
    assert x0.abs().max() <= bound * (1 + 1e-12)
    torch.testing.assert_close(x0[0], output[0], **close)  # within the bound: untouched


def test_without_seeds_there_is_no_noise():
    x_next, _ = functional.diffusion_step(X, OUT, table(row(std=1.0)), 0, prediction="sample")
    torch.testing.assert_close(x_next, 0.3 * X + 0.6 * OUT, **close)


def test_step_may_be_a_tensor():
    steps = table(row(), row(a=0.1, std=0.3))
    expected = functional.diffusion_step(X, OUT, steps, 1, seeds=SEEDS)
    for step in (torch.tensor(1), torch.tensor([1])):
        actual = functional.diffusion_step(X, OUT, steps, step, seeds=SEEDS)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("number", [-1, 2, 2**40])
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_a_step_on_the_device_that_is_no_row_reads_nothing_else(number, threshold, kernel_device):
    # Catches: coefficients read from the memory behind the table, or in front of it.
    memory = torch.ones(4, 8, device=kernel_device)
    rows, x = memory[1:3], draw(2, 3, 4).float().to(kernel_device)
    step = torch.tensor(number, device=kernel_device)
    x_next, _ = functional.diffusion_step(x, x, rows, step, dynamic_threshold=threshold, impl="fused")
    assert bool(x_next.isnan().all())
    if kernel_device == "cpu":
        message = rf"step: expected 0 <= step < 2 \(the rows of table\), got {number}"
        with pytest.raises(ValueError, match=message):
            functional.diffusion_step(x, x, rows, step, impl="reference")


def test_a_sample_does_not_depend_on_its_batch_mates():
    # Catches: statistics (threshold, rescale) or noise over the whole batch.
    options = {"guidance_rescale": 0.7, "dynamic_threshold": 0.9, "learned_range": True}
    steps = table(row(std=0.5)).float()
    output = draw(2 * B, 2 * C, 4, 3).float()
    x_next, x0 = functional.diffusion_step(X.float(), output, steps, 0, seeds=SEEDS, guidance=3.0, **options)
    for index in range(B):
        pair = torch.stack((output[index], output[B + index]))
        x, seed = X[index : index + 1].float(), SEEDS[index : index + 1]
        alone = functional.diffusion_step(x, pair, steps, 0, seeds=seed, guidance=3.0, **options)
        torch.testing.assert_close(alone[0][0], x_next[index], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone[1][0], x0[index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype):
    # The maths is float32 for every dtype of x, so the only other error is the rounding of the result.
    x, output = X.to(dtype), torch.cat((OUT, X0)).to(dtype)
    options = {"seeds": SEEDS, "guidance": 5.0, "clip": 2.0, "previous_x0": X0.to(dtype)}
    steps = table(row(c=-0.2, std=0.4))
    exact = functional.diffusion_step(x.double(), output.double(), steps, 0, **options)
    actual = functional.diffusion_step(x, output, steps.float(), 0, **options)
    for value, truth in zip(actual, exact, strict=True):
        assert value.dtype == dtype
        error = (value.double() - truth).abs()
        assert (error <= 0.51 * torch.finfo(dtype).eps * truth.abs() + 1e-5).all()


def test_model_output_may_have_another_dtype():
    steps = table(row()).float()
    x_next, x0 = functional.diffusion_step(X.float(), OUT.bfloat16(), steps, 0)
    assert x_next.dtype == x0.dtype == torch.float32


def test_any_number_of_dimensions_and_an_empty_batch():
    steps = table(row(std=0.1))
    flat = functional.diffusion_step(X.flatten(1), OUT.flatten(1), steps, 0, seeds=SEEDS)[0]
    full = functional.diffusion_step(X, OUT, steps, 0, seeds=SEEDS)[0]
    torch.testing.assert_close(flat, full.flatten(1), **close)
    empty = functional.diffusion_step(X[:0], OUT[:0], steps, 0, seeds=SEEDS[:0], dynamic_threshold=0.9)[0]
    assert empty.shape == (0, C, 4, 3)


def test_gradients():
    steps = table(row(c=-0.2, std=0.4))
    inputs = [value[:, :, :2].clone().requires_grad_() for value in (X, draw(2 * B, 2 * C, 4, 3), X0)]

    def op(x, output, previous):
        return functional.diffusion_step(
            x, output, steps, 0, seeds=SEEDS, guidance=2.0, guidance_rescale=0.5, prediction="v_prediction",
            dynamic_threshold=0.8, learned_range=True, previous_x0=previous,
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


F32, TABLE = torch.zeros(2, 3, 4), torch.ones(5, 8)
SHAPE_2 = r"\(2, 3, 4\)"


@pytest.mark.parametrize(
    "kind, message, kwargs",
    [
        (ValueError, r"x: expected \[B, C, ...\] .* got \(3,\)", {"x": F32[0, :, 0]}),
        (ValueError, rf"model_output: expected \[B, C, ...\] = {SHAPE_2}, got \(4, 3, 4\)",
         {"model_output": torch.zeros(4, 3, 4)}),
        (ValueError, rf"model_output: expected \[2B, C, ...\] = \(4, 3, 4\), got {SHAPE_2}",
         {"guidance": 2.0}),
        (ValueError, rf"model_output: expected \[B, 2C, ...\] = \(2, 6, 4\), got {SHAPE_2}",
         {"learned_range": True}),
        (ValueError, r"table: expected \[steps >= 1, 8\], got \(5, 6\)", {"table": TABLE[:, :6]}),
        (TypeError, "table: expected torch.float32 or torch.float64, got torch.bfloat16",
         {"table": TABLE.bfloat16()}),
        (ValueError, "table: expected device cpu", {"table": TABLE.to("meta")}),
        (ValueError, "step: expected 0 <= step < 5 .*, got 5", {"step": 5}),
        (ValueError, "step: expected 0 <= step < 5 .*, got -1", {"step": -1}),
        (TypeError, "step: expected torch.int64, got torch.int32",
         {"step": torch.tensor(0, dtype=torch.int32)}),
        (ValueError, r"seeds: expected \[B\] = \(2,\), got \(3,\)", {"seeds": SEEDS}),
        (ValueError, "guidance: expected a finite number, got nan", {"guidance": math.nan}),
        (ValueError, "guidance: expected a finite number, got inf", {"guidance": math.inf}),
        (TypeError, "guidance: expected a number, got str", {"guidance": "3"}),
        (ValueError, r"guidance: expected \[B\] = \(2,\), got \(3,\)", {"guidance": torch.ones(3)}),
        (ValueError, r"guidance_rescale: expected a number in \[0, 1\], got 1.5", {"guidance_rescale": 1.5}),
        (ValueError, "guidance_rescale: expected 0 because guidance is None", {"guidance_rescale": 0.5}),
        (ValueError, "prediction: expected one of .*'v_prediction'.* got 'eps'", {"prediction": "eps"}),
        (ValueError, "clip: expected a number > 0, got 0", {"clip": 0}),
        (ValueError, r"dynamic_threshold: expected a quantile in \(0, 1\], got 99.5",
         {"dynamic_threshold": 99.5}),
        (ValueError, rf"previous_x0: expected \[B, C, ...\] = {SHAPE_2}, got \(2, 3\)",
         {"previous_x0": F32[..., 0]}),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_got(kind, message, kwargs):
    arguments = {"x": F32, "model_output": F32, "table": TABLE, "step": 0, **kwargs}
    if "guidance" in kwargs and "2B" not in message:
        arguments["model_output"] = torch.cat((F32, F32))
    with pytest.raises(kind, match=message):
        functional.diffusion_step(**arguments)
