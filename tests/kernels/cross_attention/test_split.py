"""Attention whose keys are split among programs, and their merge, against float64; the plan of splits."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast import functional
from tests.ops.test_cross_attention import make
from tests.support.truth import assert_close_to_truth, outputs_and_gradients

pytest.importorskip("triton")

H100 = (9, 0)
TILES = ((64, 1.0), (128, 1.75))


@pytest.fixture
def split_by(monkeypatch, kernel_device):
    """split_by(whole, parts): tiles of 64 queries, the first `whole` with one program each."""
    from dalle2_fast.kernels.cross_attention import _split, forward

    def choose(whole: int, parts: int) -> None:
        monkeypatch.setattr(forward, "plan", lambda *sizes: _split.Split(64, whole, parts))

    return choose


def fused(**inputs):
    return functional.cross_attention(impl="fused", **inputs)


def reference(**inputs):
    return functional.cross_attention(impl="reference", **inputs)


def compare(inputs, dtype, device):
    inputs = {name: x.to(device) for name, x in inputs.items()}
    truth = outputs_and_gradients(reference, inputs, torch.float64)
    plain = outputs_and_gradients(reference, inputs, dtype)
    actual = outputs_and_gradients(fused, inputs, dtype)
    assert_close_to_truth(actual, plain, truth, slack=4e-6 if device == "cuda" else 1e-6)


# B, H, T, S, T2, D, then the number of whole tiles and of parts. A tile of keys has 32 in float32.
CASES = [
    ((1, 2, 70, 40, 70, 32), 0, 2),  # one part sees both kinds of keys
    ((1, 2, 70, 40, 70, 32), 0, 5),  # a part for each block of keys
    ((1, 2, 70, 40, 70, 32), 3, 7),  # only the last tile is split, in more parts than blocks: some see no key
    ((2, 1, 65, 300, 0, 20), 1, 3),  # no image keys, columns past D
    ((1, 1, 9, 1, 97, 16), 0, 4),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape, whole, parts", CASES)
def test_is_close_to_truth(shape, whole, parts, masked, split_by, kernel_device):
    """Catches: a block of keys lost or counted twice, parts that are not brought to one maximum, a wrong
    slot, and a log-sum-exp of one part alone, which gives wrong gradients."""
    split_by(whole, parts)
    compare(make(*shape, masked=masked), torch.float32, kernel_device)


def test_half_precision(split_by, kernel_device):
    """Catches: partial results that are rounded before they are added."""
    split_by(0, 3)
    compare(make(1, 2, 40, 70, 100, 64, masked=True), torch.float16, kernel_device)


def test_parts_of_very_different_scores(split_by, kernel_device):
    """Catches: a merge that overflows, or that forgets to scale by the largest maximum of all parts."""
    split_by(0, 4)
    inputs = make(1, 1, 20, 32, 96, 16)
    inputs["image_k"][:, :, 32:64] *= 40  # scores of about 100: the other parts hardly count
    inputs["context_k"] -= 40
    compare(inputs, torch.float32, kernel_device)


@pytest.mark.parametrize("image_keys", [0, 40])
def test_parts_with_masked_keys_alone(image_keys, split_by, kernel_device):
    """Catches: a part without a key that adds NaN or a total, and a row without any key that is not 0."""
    split_by(0, 5)
    inputs = make(2, 1, 20, 160, image_keys, 32)
    mask = torch.zeros(2, 160, dtype=torch.bool)
    mask[0, 70:90] = True
    for name in ("context_k", "context_v"):
        inputs[name] = inputs[name].masked_fill(~mask[:, None, :, None], float("nan"))
    inputs = {name: x.to(kernel_device) for name, x in (inputs | {"context_mask": mask}).items()}
    found = outputs_and_gradients(fused, inputs, torch.float32)
    expected = outputs_and_gradients(reference, inputs, torch.float32)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    if not image_keys:
        assert torch.count_nonzero(found["output"][1]) == torch.count_nonzero(found["d q"][1]) == 0


def test_equal_bits_and_nothing_unwritten(split_by, kernel_device):
    """Catches: a sum in an order that differs from run to run, an element that no program wrote."""
    split_by(1, 3)
    inputs = {name: x.to(kernel_device) for name, x in make(1, 3, 50, 70, 40, 32, masked=True).items()}
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        first, second = (outputs_and_gradients(fused, inputs, torch.float32) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name in first:
        assert bool(first[name].isfinite().all()) and torch.equal(first[name], second[name]), name


def test_the_plan_of_the_models():
    """Catches: a merge where it costs more than it saves, few programs on a large GPU, small tiles in large
    batches (599 us instead of 544 on an H200)."""
    from dalle2_fast.kernels.cross_attention._split import plan

    assert plan(10, 1024, 18, TILES, H100) == (128, 0, 3)  # unCLIP 32x32, batch 1
    assert plan(20, 1024, 18, TILES, H100) == (64, 320, 1)  # batch 2
    assert plan(640, 1024, 18, TILES, H100) == (128, 5120, 1)
    assert plan(40, 64, 3, TILES[:1], H100) == (64, 40, 1)  # 8x8
    assert plan(4, 64, 64, TILES[:1], H100).parts > 8  # four programs with 4096 keys each
    assert plan(10, 4096, 66, TILES, H100) == (128, 264, 2)  # 64x64, batch 2: the third wave alone is split


@pytest.mark.parametrize("capability", [H100, (8, 0), (7, 7)])
def test_any_plan_is_possible(capability):
    """Catches: more parts than blocks of keys, more whole tiles than tiles, a tile that nobody computes."""
    from dalle2_fast.kernels.cross_attention._split import plan

    for pairs in (1, 3, 16, 133, 1280):
        for queries in (1, 64, 100, 4096):
            for blocks in (1, 2, 18, 200):
                rows, whole, parts = plan(pairs, queries, blocks, TILES, capability)
                tiles = pairs * -(-queries // rows)
                assert rows in (64, 128) and 0 <= whole <= tiles and 1 <= parts <= blocks
                assert (parts == 1) == (whole == tiles)
