"""A pipeline whose pictures depend on every input, and in-process clients of servers on it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from dalle2_fast import DALLE2
from tests.support.tiny_pipeline import shaken_pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")


@pytest.fixture(scope="session")
def pipe() -> DALLE2:
    return shaken_pipeline()


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
