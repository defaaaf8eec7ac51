"""The device and the dtype of a command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dalle2_fast.ops import _build_info
from dalle2_fast.pipeline import device


@pytest.mark.parametrize(
    ("name", "says"),
    [("tpu", "--device: expected auto, cpu"), ("meta", "--device: expected auto, cpu"), ("", "--device")],
)
def test_unknown_device(name, says):
    with pytest.raises(ValueError, match=says):
        device.choose_device(name)


def test_cuda_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="--device: expected .* got cuda, but torch .* finds 0 CUDA device"):
        device.choose_device("cuda")


@pytest.mark.parametrize(("hardware", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype_on_the_cpu(monkeypatch, hardware, expected):
    """Emulated bfloat16 is 50 times slower than float32: the default must look at the hardware."""
    monkeypatch.setattr(_build_info, "cpu_has_bfloat16", lambda: hardware)
    assert device.choose_dtype("auto", torch.device("cpu")) == expected
    assert device.choose_dtype("fp32", torch.device("cpu")) == torch.float32
    assert device.choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16


def test_cpu_capability_agrees_with_the_system():
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("needs /proc/cpuinfo")
    words = set(flags.read_text().split())
    assert _build_info.cpu_has_bfloat16() == bool({"avx512_bf16", "amx_bf16"} & words)
