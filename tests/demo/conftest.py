"""A pipeline whose pictures depend on every input, and a job that nobody watches."""

from __future__ import annotations

import pytest

from dalle2_fast import DALLE2
from dalle2_fast.demo.studio import Studio
from dalle2_fast.demo.worker import Job
from tests.support.tiny_pipeline import shaken_pipeline


@pytest.fixture(scope="session")
def pipe() -> DALLE2:
    return shaken_pipeline()


@pytest.fixture
def studio(pipe) -> Studio:
    return Studio(pipe)


@pytest.fixture
def job() -> Job:
    return Job(lambda job: None)
