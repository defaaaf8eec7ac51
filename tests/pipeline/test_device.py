"""The device and the dtype of a command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dalle2_fast import DALLE2
from dalle2_fast.ops import _build_info
from dalle2_fast.pipeline import checkpoint, device
from tests.support.tiny_pipeline import tiny_pipeline


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
    """Without matrix units bfloat16 is 2 to 50 times slower: the default must look at the hardware."""
    monkeypatch.setattr(_build_info, "cpu_has_bfloat16_units", lambda: hardware)
    assert device.choose_dtype("auto", torch.device("cpu")) == expected
    assert device.choose_dtype("fp32", torch.device("cpu")) == torch.float32
    assert device.choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_dtype_is_that_of_the_gpu_that_is_used(monkeypatch, capability, expected):
    """`--device cuda:1` took the dtype of the current GPU, cuda:0."""
    capabilities = {0: (9, 0) if expected == torch.float32 else (7, 0), 1: capability}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: capabilities[0] >= (8, 0))
    assert device.choose_dtype("auto", torch.device("cuda:1")) == expected
    assert device.choose_dtype("auto", "cuda:1") == expected


def test_dtype_on_an_apple_gpu():
    assert device.choose_dtype("auto", "mps") == torch.float32


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (dict(device="tpu"), ValueError, "^device: expected auto, cpu"),
        (dict(device=0), TypeError, "^device: expected auto, cpu"),
        (dict(dtype="int8"), ValueError, "^dtype: expected auto, fp32, .* got 'int8'"),
        (dict(dtype=torch.int8), ValueError, "^dtype: expected .* got torch.int8"),
        (dict(dtype=None), TypeError, "^dtype: expected .* got None"),
    ],
)
def test_a_wrong_device_or_dtype_of_from_pretrained_is_named(given, error, says):
    with pytest.raises(error, match=says):
        DALLE2.from_pretrained(**given)


def test_from_pretrained_chooses_as_the_command_line_does(monkeypatch, tmp_path):
    """It meant the CPU and float32, where the command takes a GPU and bfloat16."""
    folder = tiny_pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_build_info, "cpu_has_bfloat16_units", lambda: True)
    pipe = DALLE2.from_pretrained(folder)
    assert (pipe.device.type, pipe.dtype) == ("cpu", torch.bfloat16)
    assert DALLE2.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32
    assert DALLE2.from_pretrained(folder, dtype="fp16").dtype == torch.float16
    asked = []
    monkeypatch.setattr(checkpoint, "choose_device", lambda *a, **k: asked.append(a) or torch.device("cpu"))
    DALLE2.from_pretrained(folder)
    assert asked == [("auto",)]


def test_cpu_capability_agrees_with_the_system():
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("needs /proc/cpuinfo")
    words = set(flags.read_text().split())
    assert _build_info.cpu_has_bfloat16_units() == ("amx_bf16" in words)
