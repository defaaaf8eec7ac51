"""The page over HTTP: a policy that forbids it every other host, and uvicorn."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from dalle2_fast.demo.style import CSS, theme

if TYPE_CHECKING:
    from dalle2_fast.demo.worker import Worker

MAX_UPLOAD = "20mb"
GRACE_SECONDS = 2  # after which the streams of open pages are cut
# The browser itself refuses every request to another host. Gradio's page has scripts and styles in its HTML.
POLICY = "; ".join((
    "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src 'self' 'unsafe-inline'", "img-src 'self' data: blob:", "connect-src 'self' data: blob:",
    "worker-src 'self' blob:", "font-src 'self' data:", "frame-ancestors 'self'", "base-uri 'self'",
    "form-action 'self'",
))  # fmt: skip


class SameHost:
    """ASGI middleware that adds the policy to every response.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = ((b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer"))
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def create_app(page: gr.Blocks) -> FastAPI:
    """The page as an ASGI application.

    Args:
        page: of `make_page`.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(SameHost)
    page.queue(max_size=64)
    return gr.mount_gradio_app(
        app, page, path="/", theme=theme(), css=CSS, footer_links=[], run_history=False, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, max_file_size=MAX_UPLOAD, show_error=True,
    )  # fmt: skip


def run_page(app: FastAPI, bound: socket.socket, worker: Worker, on_start: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then stop what is drawn.

    Args:
        app: of `create_app`.
        bound: a socket that does not listen yet.
        worker: draws.
        on_start: is called when browsers can connect.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, ws="none", log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    server = _Server(config, worker, on_start)
    # uvicorn raises the signal again at its end, which would end the process with an error.
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {kind: signal.signal(kind, lambda *_: None) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[bound])
    finally:
        worker.stop()
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, worker: Worker, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._worker, self._on_start = worker, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._worker.stop()
        super().handle_exit(sig, frame)
