"""The CUDA kernels of csrc/, compiled for the CPU once per test session."""

import pytest

from tests.support.native import emulated_cuda as cuda
from tests.support.native import emulated_sm90 as sm90


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory):
    library = cuda.build(tmp_path_factory.mktemp("cuda"))
    yield library
    library.set_descending(False)


@pytest.fixture(scope="session")
def emulated_sm90(tmp_path_factory):
    return sm90.build(tmp_path_factory.mktemp("sm90"))
