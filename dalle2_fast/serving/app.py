"""create_app: OpenAI's images API as a FastAPI application on a pipeline."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dalle2_fast.serving.errors import ApiError
from dalle2_fast.serving.fields import MODEL, MODELS, Edits, Fields, Generations, Variations
from dalle2_fast.serving.gate import Gate
from dalle2_fast.serving.limits import Limits
from dalle2_fast.serving.metrics import CONTENT_TYPE
from dalle2_fast.serving.server import FILES, Server

if TYPE_CHECKING:
    from dalle2_fast.pipeline.dalle2 import DALLE2


def create_app(
    pipe: DALLE2,
    limits: Limits | None = None,
    *,
    api_key: str | None = None,
    public_url: str | None = None,
    graphs: bool | str = "auto",
) -> FastAPI:
    """OpenAI's images API on a pipeline, as an ASGI application for one process.

    Args:
        pipe: the pipeline, on its device.
        limits: what is accepted; None is `Limits()`.
        api_key: what clients send as `Authorization: Bearer KEY`; None: nothing.
        public_url: how clients reach the server, for the URLs of pictures; None: as they address it.
        graphs: as in DALLE2.generate.

    Returns:
        The application; its `state.server` is the `Server`.
    """
    server = Server(pipe, limits or Limits(), api_key=api_key, public_url=public_url, graphs=graphs)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(server.batcher.close)

    # Without FastAPI's pages of documentation, whose scripts come from another host.
    app = FastAPI(title="dalle2_fast", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = server
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.include_router(_images(server))
    app.include_router(_operations(server))
    app.add_middleware(Gate, limits=server.limits, metrics=server.metrics)
    return app


def _images(server: Server) -> APIRouter:
    """The routes of OpenAI's API, for which a key may be needed."""
    router = APIRouter(prefix="/v1", dependencies=[Depends(server.authenticate)])
    for name, kind in (("generations", Generations), ("edits", Edits), ("variations", Variations)):
        router.add_api_route(
            f"/images/{name}",
            _answer(server, kind),
            methods=["POST"],
            summary=kind.__doc__,
            openapi_extra={"requestBody": _schema(kind)},
        )
    about = {"object": "model", "created": int(time.time()), "owned_by": "dalle2_fast"}

    @router.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, **about}]}

    @router.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        if name not in MODELS:
            raise ApiError(404, f"there is no model {name[:60]!r}", param="model", code="model_not_found")
        return {"id": name, **about}

    return router


def _operations(server: Server) -> APIRouter:
    """The routes without a key: pictures, whose names are the keys, and what the operator looks at."""
    router = APIRouter()

    @router.get(FILES)
    async def picture(name: str) -> Response:
        found = server.store.get(name)
        if found is None:
            raise ApiError(404, "there is no such picture, or no longer", code="not_found")
        seconds = max(0, int(found.expires - time.monotonic()))
        headers = {"Cache-Control": f"private, max-age={seconds}"}
        return Response(found.data, media_type=found.media_type, headers=headers)

    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/health")
    @router.get("/health/ready")
    async def ready(response: Response) -> dict[str, bool]:
        alive = server.batcher.alive
        response.status_code = 200 if alive else 503
        return {"live": True, "ready": alive}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router


def _answer(server: Server, kind: type[Fields]) -> Callable[[Request], Awaitable[Response]]:
    # FastAPI does not read the body, so that all errors of fields have one form.
    async def answer(request: Request) -> Response:
        return await server.images(kind, request)

    return answer


def _schema(kind: type[Fields]) -> dict[str, Any]:
    """What /openapi.json says about the body."""
    schema = kind.model_json_schema()
    for name in kind.files:
        schema["properties"][name] = {"type": "string", "format": "binary"}
    media_type = "multipart/form-data" if kind.files else "application/json"
    return {"required": True, "content": {media_type: {"schema": schema}}}


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # for type checkers: it is registered for this class
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """An error of Starlette, such as an unknown route, in the same form."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if message == HTTPStatus(error.status_code).phrase:
        message = f"{message}: {request.method} {request.url.path[:100]}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)
