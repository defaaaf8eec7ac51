"""A pipeline whose pictures depend on every input, and in-process clients of servers on it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from dalle2_fast import DALLE2
from tests.support.tiny_pipeline import tiny_pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")


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
def connect(pipe) -> Iterator[Callable]:
    """connect(limits=Limits(), **options of create_app) -> a client."""
    from starlette.testclient import TestClient

    from dalle2_fast.serving.app import create_app

    with ExitStack() as stack:
        yield lambda limits=None, **options: stack.enter_context(
            TestClient(create_app(pipe, limits, **options))
        )


@pytest.fixture
def client(connect):
    return connect()


@pytest.fixture(scope="session")
def image_file() -> Callable[..., bytes]:
    """image_file(side, hole, format) -> a file; its left half is transparent where there is a hole."""
    from PIL import Image

    def make(side: int = 32, hole: bool = False, kind: str = "PNG", color: str = "red") -> bytes:
        image = Image.new("RGBA" if hole else "RGB", (side, side), color)
        if hole:
            image.paste((0, 0, 0, 0), (0, 0, side // 2, side))
        file = io.BytesIO()
        image.save(file, kind)
        return file.getvalue()

    return make
