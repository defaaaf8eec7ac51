"""Test-wide settings: one thread (many are slower on a busy machine), the kernels' interpreter where there is
no GPU, and gpu tests only where one is."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is first imported

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Before anything imports triton: a kernel is interpreted or compiled according to this at its definition.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """Where the kernels run in this session: "cuda", or "cpu" in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    if torch.cuda.is_available():
        return "cuda"
    import interpreter_bf16

    interpreter_bf16.mend()
    return "cpu"
