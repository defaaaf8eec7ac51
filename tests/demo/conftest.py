"""A pipeline whose pictures depend on every input, and a job that nobody watches."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast import DALLE2
from dalle2_fast.demo.studio import Studio
from dalle2_fast.demo.worker import Job
from tests.support.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="session")
def pipe() -> DALLE2:
    pipe = tiny_pipeline().eval()
    with torch.no_grad():  # an untrained U-Net answers zero to every input
        for name, parameter in pipe.named_parameters():
            if name.startswith(("decoder", "upsampler")):
                generator = torch.Generator().manual_seed(len(name) * 1000 + parameter.numel())
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return pipe


@pytest.fixture
def studio(pipe) -> Studio:
    return Studio(pipe)


@pytest.fixture
def job() -> Job:
    return Job(lambda job: None)
