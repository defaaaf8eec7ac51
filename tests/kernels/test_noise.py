"""The kernels of add_noise and sample_noise, and their random number generator, against the references."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast import functional, reference
from tests.support.truth import assert_close_to_truth

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

import dalle2_fast.kernels.diffusion.noise  # noqa: E402, F401  registers the ops
from dalle2_fast.kernels import _math  # noqa: E402

SEEDS = [3, -4, 2**40 + 5]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@triton.jit
def _words_kernel(out_ptr, counter_ptr, seed_ptr, step):
    lane = tl.arange(0, 4)
    counter = tl.load(counter_ptr + lane).to(tl.uint32)
    seed = tl.load(seed_ptr)
    words = _math.philox_4x32_10(
        counter, counter ^ 5, step.to(tl.uint32), (step >> 32).to(tl.uint32),
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
    )  # fmt: skip
    for index in tl.static_range(4):
        tl.store(out_ptr + index * 4 + lane, words[index].to(tl.int64))


def test_philox_words_are_those_of_the_reference(kernel_device):
    counter = torch.tensor([0, 1, 2**31 + 7, 2**32 - 1], device=kernel_device)
    seed, step = torch.tensor([-(2**60) - 3], device=kernel_device), 2**41 + 9
    out = torch.empty(4, 4, dtype=torch.int64, device=kernel_device)
    _words_kernel[(1,)](out, counter, seed, step)
    low, high = torch.tensor(0xFFFFFFFF, device=kernel_device), 32
    step = torch.tensor(step, device=kernel_device)
    words = reference.philox_4x32_10(
        (counter, counter ^ 5, step & low, step >> high), (seed & low, (seed >> high) & low)
    )
    assert torch.equal(out, torch.stack(words))


@triton.jit
def _normal_parts_kernel(out_ptr, u_ptr):
    lane = tl.arange(0, 16)
    u = tl.load(u_ptr + lane)
    cosine, sine = _math.cos_sin_of_turns(u)
    tl.store(out_ptr + lane, _math.log_of_uniform(u))
    tl.store(out_ptr + 16 + lane, cosine)
    tl.store(out_ptr + 32 + lane, sine)


def test_logarithm_and_circle_where_they_are_hard(kernel_device):
    # Near 1 a fast logarithm loses all its digits; at the eighths of a turn the quadrant changes.
    eighths = [index / 8 for index in range(9)]
    hard = [2.0**-33, 2.0**-20, 0.3, 0.70710678, 0.9, 1 - 2.0**-12, 1 - 2.0**-24]
    u = torch.tensor(hard + eighths, device=kernel_device)
    out = torch.empty(3, 16, device=kernel_device)
    _normal_parts_kernel[(1,)](out, u)
    exact = u.double()
    torch.testing.assert_close(out[0, u > 0].double(), exact[u > 0].log(), rtol=2e-7, atol=0)
    angle = 2 * torch.pi * exact
    circle = torch.stack((angle.cos(), angle.sin()))
    torch.testing.assert_close(out[1:].double(), circle, rtol=0, atol=1.5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sample_noise(dtype, kernel_device):
    seeds, step = torch.tensor(SEEDS), 2**40 + 5
    for shape in ((3, 3, 5, 7), (1, 1)) if dtype == torch.float32 else ((2, 9),):
        actual = torch.ops.dalle2_fast.sample_noise(
            seeds[: shape[0]].to(kernel_device), None, step, shape, dtype
        ).cpu()
        arguments = (seeds[: shape[0]], step, shape)
        truth = reference.sample_noise(*arguments, torch.float64)
        assert_close_to_truth(actual, reference.sample_noise(*arguments, dtype), truth)
        on_device = torch.tensor(step, device=kernel_device)
        again = torch.ops.dalle2_fast.sample_noise(
            seeds[: shape[0]].to(kernel_device), on_device, 0, shape, dtype
        )
        assert torch.equal(actual, again.cpu())


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "slice", "vector"])
@pytest.mark.parametrize("drawn", [True, False])
def test_add_noise(layout, drawn, kernel_device):
    dtype = torch.float16 if layout == "nchw" else torch.float32
    x0, noise = draw(2, 3, 5, 7).to(dtype), draw(2, 3, 5, 7, seed=1).to(dtype)
    if layout == "nhwc":
        x0 = x0.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        x0 = draw(2, 3, 5, 9).to(dtype)[..., 1:8]
    if layout == "vector":
        x0, noise = x0[:, 0, 0, 0], noise[:, 0, 0, 0]
    alpha, sigma = torch.tensor([0.3, 0.8]), torch.tensor([0.9, 0.5])
    source = {"seeds": torch.tensor(SEEDS[:2]), "step": 7} if drawn else {"noise": noise}
    inputs = {"x0": x0, "alpha": alpha, "sigma": sigma, **source}
    plain = functional.add_noise(**inputs, impl="reference")
    exact = {name: inputs[name].double() for name in ("x0", "alpha", "sigma")}
    truth = {**exact, "noise": plain[1].double()}  # the noise that was added is the rounded one
    truth = functional.add_noise(**truth, impl="reference")
    moved = {k: v.to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    x_t, added = functional.add_noise(**moved, impl="fused")
    assert_close_to_truth(added, plain[1], truth[1])
    assert_close_to_truth(x_t, plain[0], truth[0])
    assert x_t.dtype == dtype
    assert x_t.stride() == (x0 if layout == "nhwc" else x0.contiguous()).stride()


@pytest.mark.parametrize("drawn", [True, False])
def test_add_noise_gradients(drawn, kernel_device):
    tensors = {"x0": draw(2, 3, 4), "alpha": torch.rand(2), "sigma": torch.rand(2)}
    if not drawn:
        tensors["noise"] = draw(2, 3, 4, seed=1)
    seeds = {"seeds": torch.tensor(SEEDS[:2]), "step": 7} if drawn else {}

    def gradients(impl, device, dtype=torch.float32):
        leaves = {k: v.to(device, dtype, copy=True).requires_grad_() for k, v in tensors.items()}
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in seeds.items()}
        x_t, noise = functional.add_noise(**leaves, **moved, impl=impl)
        if drawn:
            assert not noise.requires_grad
        (x_t * draw(2, 3, 4, seed=5).to(x_t)).sum().backward()
        return {k: v.grad for k, v in leaves.items()}

    assert_close_to_truth(
        gradients("fused", kernel_device), gradients("reference", "cpu"),
        gradients("reference", "cpu", torch.float64),
    )  # fmt: skip
