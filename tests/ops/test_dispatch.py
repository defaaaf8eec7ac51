"""What holds for every op: dispatch, tracing, the meta device. Also build_info, and the tests' comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dalle2_fast import functional
from dalle2_fast.ops import _build_info, _dispatch
from tests.support.truth import assert_close_to_truth

ROOT = Path(__file__).resolve().parents[2]
SEEDS = torch.arange(2)


def calls(device="cpu"):
    def full(*shape):
        return torch.ones(*shape, device=device)

    x, q, seeds = full(2, 4, 3, 3), full(2, 2, 3, 4), SEEDS.to(device)
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    return {
        "group_norm_silu": lambda: functional.group_norm_silu(x, 2, scale=x[..., 0, 0]),
        "conv3x3": lambda: functional.conv3x3(x, full(5, 4, 3, 3), full(5), full(2, 5, 6, 6), upsample=True),
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


# op -> a call on inputs that no kernel takes.
def unservable(dtype=torch.float64, device="cpu"):
    x = torch.ones(2, 4, 3, 3, dtype=dtype, device=device)
    q, one, table = x[:, :2], x[:, 0, 0, 0], torch.ones(3, 8, device=device)
    return {
        "group_norm_silu": lambda impl: functional.group_norm_silu(x, 2, impl=impl),
        "cross_attention": lambda impl: functional.cross_attention(q, q, q, impl=impl),
        "add_noise": lambda impl: functional.add_noise(x, one, one, x, impl=impl),
        "diffusion_step": lambda impl: functional.diffusion_step(x, x, table, 0, impl=impl),
    }


@pytest.mark.parametrize("op", list(unservable()))
def test_fused_raises_where_no_kernel_can_run(op):
    # Catches: a silent fall-back to the reference.
    with pytest.raises(RuntimeError, match='impl="fused": no kernel takes torch.float64 .* use impl="auto"'):
        unservable()[op]("fused")
    with pytest.raises(RuntimeError, match='impl="fused": no kernel runs on device meta; use'):
        unservable(torch.float32, "meta")[op]("fused")
    with pytest.raises(ValueError, match="impl: expected one of 'auto', 'reference', 'fused', got None"):
        unservable()[op](None)
    assert unservable(torch.float32, "meta")[op]("auto") is not None


CONTRASTIVE = ("contrastive_loss", "sigmoid_loss", "soft_contrastive_loss")


def contrastive(op, impl, dtype=torch.float32, device="cpu"):
    arguments = {"logit_bias": -1.0} if op == "sigmoid_loss" else {}
    features = torch.ones(3, 4, dtype=dtype, device=device)
    return getattr(functional, op)(features, features, 2.0, impl=impl, **arguments)


@pytest.mark.parametrize("op", CONTRASTIVE)
def test_fused_raises_where_the_native_module_cannot_run(op, monkeypatch):
    with pytest.raises(ValueError, match="impl: expected one of .* got 'fast'"):
        contrastive(op, "fast")
    with pytest.raises(RuntimeError, match='impl="fused": no kernel runs on device meta; use impl="auto"'):
        contrastive(op, "fused", device="meta")
    with pytest.raises(RuntimeError, match='impl="fused": no kernel takes torch.float8_e5m2'):
        contrastive(op, "fused", dtype=torch.float8_e5m2)
    monkeypatch.setattr(_dispatch._native, "WHY_ABSENT", "the native module is not here")
    monkeypatch.setattr(_dispatch, "_native_answers", {})
    with pytest.raises(RuntimeError, match='impl="fused": the native module is not here'):
        contrastive(op, "fused")
    assert contrastive(op, "auto") == contrastive(op, "reference")
    monkeypatch.setattr(_dispatch, "MIN_FUSED_LOGITS", 0)
    assert contrastive(op, "auto") == contrastive(op, "reference")


def on_cuda(monkeypatch, dtype=torch.float16, capability=(9, 0)):
    """A stand-in for a tensor on a GPU of this capability, in a torch with CUDA."""
    properties = SimpleNamespace(name="Some GPU", major=capability[0], minor=capability[1])
    monkeypatch.setattr(_dispatch, "_kernel_answers", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return SimpleNamespace(dtype=dtype, device=torch.device("cuda", 0), is_cuda=True)


def test_auto_is_fused_on_a_gpu_only(monkeypatch, kernel_device):
    cpu = torch.zeros(1)
    assert _dispatch.use_reference("auto", cpu) and _dispatch.use_reference("reference", cpu)
    half = on_cuda(monkeypatch)
    assert not _dispatch.use_reference("auto", half) and not _dispatch.use_reference("fused", half, None)
    assert _dispatch.use_reference("reference", half)
    assert _dispatch.use_reference("auto", half, on_cuda(monkeypatch, torch.float64))


def test_what_stands_in_the_way_on_a_gpu(monkeypatch):
    old = on_cuda(monkeypatch, capability=(7, 5))
    assert _dispatch.use_reference("auto", old)
    with pytest.raises(RuntimeError, match="need compute capability 8.0, Some GPU has 7.5"):
        _dispatch.use_reference("fused", old)
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm calls its devices cuda as well
    monkeypatch.setattr(_dispatch, "_kernel_answers", {})
    assert _dispatch.use_reference("auto", old)
    with pytest.raises(RuntimeError, match="for NVIDIA GPUs"):
        _dispatch.use_reference("fused", old)
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    assert _dispatch.use_reference("auto", on_cuda(monkeypatch))
    with pytest.raises(RuntimeError, match="triton, which is not installed"):
        _dispatch.use_reference("fused", on_cuda(monkeypatch))


def test_the_cpu_takes_the_native_module(monkeypatch):
    """Catches: the slow reference where the CPU has a kernel, or a missing kernel that is not named."""
    value = torch.zeros(1)
    assert not _dispatch.use_reference("auto", value) and not _dispatch.use_reference("fused", value)
    assert _dispatch.use_reference("auto", value.double())  # no kernel takes float64
    assert _dispatch.use_reference("auto", value, on_cpu=False)
    with pytest.raises(RuntimeError, match="the op has no kernel for the CPU; TRITON_INTERPRET=1"):
        _dispatch.use_reference("fused", value, on_cpu=False)
    monkeypatch.setattr(_dispatch._native, "WHY_ABSENT", "the native module is not here")
    monkeypatch.setattr(_dispatch, "_kernel_answers", {})
    assert _dispatch.use_reference("auto", value)
    with pytest.raises(RuntimeError, match="the native module is not here"):
        _dispatch.use_reference("fused", value)


def test_auto_interprets_nothing(kernel_device):
    """Catches: networks that TRITON_INTERPRET=1 makes run in the interpreter, thousands of times slower."""
    if kernel_device == "cpu":
        assert _dispatch.use_reference("auto", torch.zeros(1))
        assert not _dispatch.use_reference("fused", torch.zeros(1), on_cpu=False)


LAZY = """
import sys, torch
from dalle2_fast import functional
from dalle2_fast.ops import _dispatch
functional.group_norm_silu(torch.ones(1, 4, 2), 2)
assert "triton" not in sys.modules, "triton was imported for a reference"
assert not _dispatch.use_reference("fused", torch.ones(1))
assert "triton" in sys.modules
"""


def test_triton_is_imported_when_a_kernel_is_first_used(kernel_device):
    done = subprocess.run([sys.executable, "-c", LAZY], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr


BFLOAT16 = """
import torch
from dalle2_fast import functional
q, x = torch.ones(1, 1, 4, 16, dtype=torch.bfloat16), torch.ones(1, 4, 2, dtype=torch.bfloat16)
for call in (
    lambda: functional.cross_attention(q, q, q, impl="fused"),
    lambda: torch.autocast("cpu", torch.bfloat16)(functional.cross_attention)(*[q.float()] * 3, impl="fused"),
    lambda: functional.group_norm_silu(x, 2, impl="fused"),
):
    try:
        call()
    except RuntimeError as error:
        assert "Triton's interpreter computes bfloat16 wrongly" in str(error), error
    else:
        raise AssertionError("computed")
functional.group_norm_silu(x.half(), 2, impl="fused")
"""


def test_triton_s_interpreter_is_not_trusted_with_bfloat16(kernel_device):
    # Catches: attention that is off by 8e8. The tests of the kernels correct the interpreter themselves.
    done = subprocess.run([sys.executable, "-c", BFLOAT16], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_build_info_is_json_and_complete():
    info = json.loads(json.dumps(_build_info.build_info()))
    assert info["torch"] == torch.__version__
    kernels = set(info["kernels"] if info["devices"] else info["cpu_kernels"])
    losses = set(_build_info.LOSSES)
    assert bool(kernels & set(info["fused_ops"])) == (info["why_not_fused"] is None)
    assert set(info["fused_ops"]) <= kernels | losses <= set(functional.__all__)
    if not info["devices"]:  # with a GPU it depends on what the module was built for
        assert (losses <= set(info["fused_ops"])) == info["native_extension"]
        assert (info["cpu_instructions"] is not None) == info["native_extension"]
    assert isinstance(info["native_extension"], bool)
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
