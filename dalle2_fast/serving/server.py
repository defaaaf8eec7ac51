"""Server: from a request for pictures to its answer; what the routes of `create_app` share."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from base64 import b64encode
from functools import partial
from typing import TYPE_CHECKING

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dalle2_fast.serving.batching import Batcher, Closed, Picture, QueueFull
from dalle2_fast.serving.body import read_request
from dalle2_fast.serving.errors import ApiError
from dalle2_fast.serving.fields import Fields
from dalle2_fast.serving.gate import CLIENT_GONE
from dalle2_fast.serving.image_bytes import encode_picture
from dalle2_fast.serving.limits import Limits
from dalle2_fast.serving.metrics import Metrics
from dalle2_fast.serving.model import ImageModel
from dalle2_fast.serving.store import PictureStore

if TYPE_CHECKING:
    from PIL.Image import Image

    from dalle2_fast.pipeline.dalle2 import DALLE2

FILES = "/v1/images/files/{name}"
DECODERS = 2  # uploads that are decoded at a time: each may need twelve bytes for a pixel
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")


class Server:
    """What the routes share.

    Args:
        pipe: the pipeline.
        limits: of requests.
        api_key: what clients have to send; None: nothing.
        public_url: how clients reach the server; None: as the Host header of each request says.
        graphs: as in DALLE2.generate.
    """

    def __init__(
        self,
        pipe: DALLE2,
        limits: Limits,
        *,
        api_key: str | None = None,
        public_url: str | None = None,
        graphs: bool | str = "auto",
    ) -> None:
        self.limits, self.public_url = limits, public_url
        self._key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        self.store = PictureStore(limits.url_bytes, limits.url_seconds)
        self.metrics = Metrics(
            lambda: self.batcher.waiting, lambda: self.batcher.running, lambda: self.store.bytes
        )
        self.model = ImageModel(pipe, limits, graphs=graphs, on_stage=self._observe_stage)
        self.batcher = Batcher(
            self._draw, self.model.capacity, max_wait=limits.max_wait, max_queue=limits.max_queue
        )
        self.started = int(time.time())
        self._decoders = anyio.CapacityLimiter(DECODERS)

    def _observe_stage(self, stage: str, seconds: float) -> None:
        self.metrics.stage_seconds.labels(stage).observe(seconds)

    def _draw(self, settings, inputs, seeds, abandoned) -> list[Image]:
        self.metrics.batch_size.observe(len(inputs))
        return self.model.draw(settings, inputs, seeds, abandoned)

    def authenticate(self, request: Request) -> None:
        """ApiError 401 unless the request has the API key."""
        if self._key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        sent = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent, self._key):
            raise ApiError(
                401, "Authorization: expected 'Bearer KEY' with this server's key, got another one or none",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def images(self, kind: type[Fields], request: Request) -> Response:
        """Answer a request for pictures."""
        fields, files = await read_request(kind, request)
        # In another thread, because unknown words and large images take a while.
        pictures = await anyio.to_thread.run_sync(
            self.model.prepare, fields, files, limiter=self._decoders if files else None
        )
        files.clear()
        request.state.log = {"images": fields.n}
        try:
            images = await self._drawn(pictures, request)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        media_type = f"image/{fields.output_format}"
        encode = partial(encode_picture, kind=fields.output_format)
        encoded = [await anyio.to_thread.run_sync(encode, image) for image in images]
        data = []
        for picture, file in zip(pictures, encoded, strict=True):
            if fields.response_format == "b64_json":
                entry = {"b64_json": b64encode(file).decode()}
            else:
                name = self.store.put(file, media_type)
                entry = {"url": f"{self._base_url(request)}{FILES.format(name=name)}"}
            data.append({**entry, "seed": picture.seed})
        self.metrics.images.labels(request.scope["route"].path).inc(len(data))
        size = f"{images[0].width}x{images[0].height}"
        return JSONResponse(
            {"created": int(time.time()), "data": data, "size": size, "output_format": fields.output_format}
        )

    async def _drawn(self, pictures: list[Picture], request: Request) -> list[Image]:
        """The pictures, drawn. ClientGone, or ApiError 429, 503, 504 or of the model."""
        try:
            self.batcher.submit(pictures)
        except QueueFull:
            seconds = self.batcher.retry_after
            raise ApiError(
                429, f"{self.batcher.waiting} pictures wait already; try again in {seconds} seconds",
                code="rate_limit_exceeded", headers={"Retry-After": str(seconds)},
            ) from None  # fmt: skip
        except Closed:
            raise _closing() from None
        drawn = asyncio.gather(*(asyncio.wrap_future(picture.future) for picture in pictures))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait(
                {drawn, gone}, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if drawn.done():
                return drawn.result()
            if gone.done():
                raise ClientGone
            raise ApiError(504, f"no picture within {self.limits.timeout:g} seconds", code="timeout")
        except Closed:
            raise _closing() from None
        except ValueError as error:  # something that this pipeline cannot do
            raise ApiError(400, str(error)) from None
        except FloatingPointError as error:
            raise ApiError(500, str(error)) from None
        finally:
            gone.cancel()
            drawn.cancel()
            self.batcher.cancel(pictures)

    def _base_url(self, request: Request) -> str:
        if self.public_url is not None:
            return self.public_url.rstrip("/")
        host = request.headers.get("host", "")
        if not _HOST.fullmatch(host):  # it becomes part of an answer
            address, port = request.scope["server"]
            host = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        return f"{request.url.scheme}://{host}"


class ClientGone(Exception):
    """The client has closed the connection."""


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _closing() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})
