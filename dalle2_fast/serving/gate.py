"""Gate: what every request passes: limits of its body, one line of the access log, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dalle2_fast.serving.errors import ApiError
from dalle2_fast.serving.limits import Limits
from dalle2_fast.serving.metrics import Metrics

ACCESS = logging.getLogger("dalle2_fast.serving.access")
LOG = logging.getLogger("dalle2_fast.serving")
CLIENT_GONE = 499  # nginx's status for a client that closed the connection; nobody receives it


class Gate:
    """ASGI middleware.

    Args:
        app: what it lets requests through to.
        limits: of bodies.
        metrics: that it counts in.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan
            await self.app(scope, receive, send)
            return
        request = _Request(scope, receive, send, self.limits)
        try:
            await self.app(scope, request.receive, request.send)
        except ClientDisconnect:  # while the body was read
            pass
        except Exception:
            LOG.exception("request %s failed", request.id)
            if request.status != CLIENT_GONE:  # the response has begun; the connection ends it
                raise
            message = f"internal error; the server's log has details of request {request.id}"
            error = ApiError(500, message)
            await JSONResponse(error.body(), 500)(scope, request.receive, request.send)
        finally:
            self._record(scope, request)

    def _record(self, scope: Scope, request: _Request) -> None:
        # The route, not the path: paths contain the names of pictures, and no client may add labels.
        route = getattr(scope.get("route"), "path", "unmatched")
        seconds = time.monotonic() - request.began
        self.metrics.requests.labels(route, str(request.status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": request.id,
            "client": (scope.get("client") or ["-"])[0],
            "method": scope["method"],
            "route": route,
            "status": request.status,
            "seconds": round(seconds, 4),
            "bytes_in": request.received,
            **scope.get("state", {}).get("log", {}),
        }
        ACCESS.info(json.dumps(line))


class _Request:
    """One request: its body is counted while it arrives, and its status noted."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        self._receive, self._send, self._limits = receive, send, limits
        self.id, self.began = secrets.token_hex(8), time.monotonic()
        self.status, self.received = CLIENT_GONE, 0
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        self._declared = int(declared) if declared.isdigit() else 0
        self._complete = not self._declared and b"transfer-encoding" not in headers

    async def receive(self) -> Message:
        """The next part of the body. ApiError 413 or 408 for too large or too slow ones."""
        if self._complete:  # from now on it waits for the client to disconnect
            return await self._receive()
        most = self._limits.max_body
        rest = self.began + self._limits.body_timeout - time.monotonic()
        if self._declared <= most:
            try:
                message = await asyncio.wait_for(self._receive(), max(0.0, rest))
            except asyncio.TimeoutError:
                seconds = f"{self._limits.body_timeout:g} seconds"
                raise ApiError(408, f"body: expected all of it within {seconds}, got a part of it") from None
            self.received += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        if max(self._declared, self.received) > most:
            came = f"{self._declared:,}" if self._declared > most else "more"
            raise ApiError(413, f"body: expected at most {most:,} bytes, got {came}")
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response; a connection whose body was not read to its end closes with it."""
        if message["type"] == "http.response.start":
            await self._discard_body()
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.id.encode())]
            headers.append((b"x-content-type-options", b"nosniff"))
            if not self._complete:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)

    async def _discard_body(self) -> None:
        # A client that still sends when the connection closes may not see why it was refused.
        while not self._complete:
            try:
                await self.receive()
            except ApiError:
                return
