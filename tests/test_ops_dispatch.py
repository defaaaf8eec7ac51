"""What holds for every op: dispatch, tracing, the meta device; build_info; the tests' own yardstick."""

from __future__ import annotations

import json

import pytest
import torch
from truth import assert_close_to_truth

from dalle2_fast import _backend, functional

SEEDS = torch.arange(2)


def calls(device="cpu"):
    def full(*shape):
        return torch.ones(*shape, device=device)

    x, q, seeds = full(2, 4, 3, 3), full(2, 2, 3, 4), SEEDS.to(device)
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    return {
        "group_norm_silu": lambda: functional.group_norm_silu(x, 2, scale=x[..., 0, 0]),
        "cross_attention": lambda: functional.cross_attention(q, q, q, mask, q, q),
        "sample_noise": lambda: functional.sample_noise(seeds, 1, (2, 5)),
        "add_noise": lambda: functional.add_noise(x, full(2), full(2), seeds=seeds)[0],
        "diffusion_step": lambda: functional.diffusion_step(
            x, full(4, 8, 3, 3), full(3, 8), torch.ones((), dtype=torch.int64, device=device), seeds=seeds,
            guidance=2.0, guidance_rescale=0.5, dynamic_threshold=0.9, learned_range=True,
        )[0],
        "contrastive_loss": lambda: functional.contrastive_loss(full(3, 4), full(3, 4), 2.0),
        "sigmoid_loss": lambda: functional.sigmoid_loss(full(3, 4), full(3, 4), 2.0, -1.0),
        "soft_contrastive_loss": lambda: functional.soft_contrastive_loss(full(3, 4), full(3, 4), 2.0),
    }  # fmt: skip


OPS = list(calls())


def test_every_public_op_is_listed_here():
    assert sorted(OPS) == sorted(functional.__all__)


@pytest.mark.parametrize("op", OPS)
def test_runs_on_the_meta_device(op):
    # Catches: a value read in Python, which on a GPU waits for the device and breaks graph capture.
    actual, expected = calls("meta")[op](), calls()[op]()
    assert actual.device.type == "meta"
    assert actual.shape == expected.shape and actual.dtype == expected.dtype


@pytest.mark.parametrize("op", OPS)
def test_traces_without_a_graph_break(op):
    function = calls()[op]
    traced = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(), function())


def test_impl():
    tensor = torch.zeros(1)
    assert _backend.use_reference("auto", tensor) and _backend.use_reference("reference", tensor)
    with pytest.raises(RuntimeError, match='impl="fused": .* no fused kernels'):
        _backend.use_reference("fused", tensor)
    with pytest.raises(ValueError, match="impl: expected one of 'auto', 'reference', 'fused', got None"):
        _backend.use_reference(None, tensor)


def test_build_info_is_json_and_complete():
    info = json.loads(json.dumps(_backend.build_info()))
    assert info["torch"] == torch.__version__
    assert info["fused_ops"] == [] and isinstance(info["native_extension"], bool)
    assert {"dalle2_fast", "python", "platform", "triton", "cuda", "devices", "cpu_threads"} <= set(info)


def test_the_yardstick_sees_faults():
    # A comparison that cannot fail is worse than none.
    torch.manual_seed(0)
    truth = torch.randn(1000, dtype=torch.float64)
    plain = truth.bfloat16()
    assert_close_to_truth(plain, plain, truth)
    one_wrong, not_finite = plain.clone(), plain.clone()
    one_wrong[17] += 0.1
    not_finite[3] = float("nan")
    for wrong in (plain * 1.02, one_wrong, not_finite, plain[:-1], torch.zeros_like(plain)):
        with pytest.raises(AssertionError):
            assert_close_to_truth(wrong, plain, truth)
    with pytest.raises(AssertionError, match="d x: "):
        assert_close_to_truth({"d x": one_wrong}, {"d x": plain}, {"d x": truth})
