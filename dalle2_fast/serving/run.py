"""run_server: a socket, uvicorn with limits for slow clients, and an end that finishes what runs."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from fastapi import FastAPI

HEADER_SECONDS = 10  # in which the head of a request has to arrive
UNREAD_MILLISECONDS = 60_000  # after which a client that does not read its response is cut off
MAX_CONNECTIONS = 1000  # more get uvicorn's 503
ANSWER_SECONDS = 5  # from the end of the grace period to the last byte of the last answer


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, so that a wrong address is an error before the weights load.

    Args:
        host: an address or a name.
        port: 0 is any free one.

    Raises:
        ValueError: the address cannot be used; the message says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":  # a restart need not wait for the connections of the last run
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # accepted connections inherit it
                bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MILLISECONDS)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--host, --port: cannot serve at {host}:{port}: {reason}") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a socket as a URL."""
    address, port = bound.getsockname()[:2]
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether other machines cannot reach the socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def run_server(
    app: FastAPI,
    bound: socket.socket,
    *,
    grace: float = 30.0,
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        app: of `create_app`.
        bound: of `bind`.
        grace: seconds after the signal in which requests that were accepted are finished; those that are
            not get status 503.
        on_start: is called when clients can connect.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, http=_Protocol, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=int(grace) + ANSWER_SECONDS,
    )  # fmt: skip
    server = _Server(config, app, grace, on_start)
    # uvicorn raises the signal again at its end, which would end the process with an error.
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {}
    if in_main_thread:
        handlers = {kind: signal.signal(kind, lambda *_: None) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(server.serve(sockets=[bound]))
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


class _Server(uvicorn.Server):
    """uvicorn's server, which ends accepted requests itself when the grace period is over."""

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, grace: float, on_start: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._batcher, self._grace, self._on_start = app.state.server.batcher, grace, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            timer = threading.Timer(self._grace, self._batcher.close)
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)


class _Protocol(H11Protocol):
    """uvicorn's protocol, which closes connections whose request does not begin in time.

    uvicorn has a limit only between two requests, and it ends with the first byte of the next one.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting:
            self._disarm()
        elif self._timer is None:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
