"""Settings of all tests: one thread (more are slower on a busy machine); without a GPU, no tests for one.

On the CPU an op runs as for a user, in dalle2_fast._C where it has a kernel there. A test that takes
`kernel_device` gets the kernels of Triton instead, in its interpreter.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is first imported

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Set before triton is imported, because it decides at a kernel's definition whether it is interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dalle2_fast.ops import _dispatch  # noqa: E402

_dispatch._INTERPRETED = False  # until a test asks for `kernel_device`


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """`-n auto`: one more than there are cores, because tests that start processes wait for them."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else None


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def kernel_device():
    """The device of Triton's kernels: "cuda", or "cpu" in the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    if torch.cuda.is_available():
        yield "cuda"
        return
    from tests.support import interpreter, interpreter_bf16

    interpreter_bf16.mend()
    with interpreter.interpreted():
        yield "cpu"


@pytest.fixture(scope="session")
def karlo(tmp_path_factory):
    """diffusers' pipeline with a scaled-down Karlo. Tests do not change it."""
    from tests.support import tiny_karlo

    pipe = tiny_karlo.pipeline(tmp_path_factory.mktemp("tokenizer"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def karlo_folder(karlo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("karlo")
    karlo.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def karlo_originals(karlo, tmp_path_factory) -> Path:
    """Karlo's original files with the same weights; its CLIP, OpenAI's, is here one of ours."""
    from dalle2_fast import CLIP
    from tests.support import tiny_karlo

    folder = tiny_karlo.original_files(tmp_path_factory.mktemp("originals"), karlo.components)
    clip = CLIP(dim_text=64, dim_image=64, dim_latent=64, text_enc_depth=1, text_heads=1, visual_enc_depth=1,
                visual_heads=1, visual_image_size=16, visual_patch_size=8)
    state = clip.state_dict() | {"input_resolution": torch.tensor(16)}  # OpenAI's files are recognised by it
    torch.save(state, folder / "ViT-L-14.pt")
    return folder
