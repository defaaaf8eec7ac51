"""Clients that are slow, or go away: requests in pieces, handed to the application and to the protocol."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from dalle2_fast.serving import run
from dalle2_fast.serving.app import create_app
from dalle2_fast.serving.limits import Limits

GENERATE = "/v1/images/generations"
BODY = json.dumps({"prompt": "a red ring"}).encode()


async def call(app, receive, **headers: str) -> list[dict]:
    """What the application sends for a POST whose messages `receive` gives."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": GENERATE, "raw_path": GENERATE.encode(), "query_string": b"", "root_path": "",
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        "headers": [(b"content-type", b"application/json"),
                    *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items())],
    }  # fmt: skip
    sent = []

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


def messages(*given: dict | float):
    """A `receive` that gives these messages; it sleeps where there is a number, and for ever at the end."""
    rest = iter(given)

    async def receive():
        for message in rest:
            if not isinstance(message, float):
                return message
            await asyncio.sleep(message)
        await asyncio.Event().wait()

    return receive


def part(body: bytes, more: bool = False) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


def counted(app, status: int) -> bool:
    line = f'dalle2_requests_total{{route="{GENERATE}",status="{status}"}} 1.0'
    return line in app.state.server.metrics.text().decode()


def test_a_body_that_does_not_come_is_408_and_closes_the_connection(pipe):
    """Catches: a client that occupies the server with a byte a minute."""
    app = create_app(pipe, Limits(body_timeout=0.1))
    receive = messages(part(BODY[:5], more=True), 0.03, part(BODY[5:9], more=True))
    start, body = asyncio.run(call(app, receive, content_length=str(len(BODY))))
    assert start["status"] == 408 and (b"connection", b"close") in start["headers"]
    assert "within 0.1 seconds" in json.loads(body["body"])["error"]["message"]


def test_a_refused_body_within_the_limit_is_read_to_its_end(pipe):
    """Catches: a client with a wrong key that sees a reset connection in place of the reason."""
    app = create_app(pipe, api_key="secret")
    rest = [part(bytes(1000), more=True), part(bytes(1000))]
    start, _ = asyncio.run(call(app, messages(*rest), content_length="2000"))
    assert start["status"] == 401 and (b"connection", b"close") not in start["headers"]
    start, _ = asyncio.run(call(app, messages(*rest), content_length="99000000"))
    assert start["status"] == 401 and (b"connection", b"close") in start["headers"]


def test_a_client_that_goes_away_while_it_sends(pipe):
    """Catches: half a body that is taken for a request, and an exception of the framework in the log."""
    app = create_app(pipe)
    assert asyncio.run(call(app, messages(part(BODY, more=True), GONE), transfer_encoding="chunked")) == []
    assert counted(app, 499)


def test_what_waits_for_a_client_that_has_gone_is_dropped(pipe):
    """Catches: pictures that are drawn for nobody, and others' that are dropped with them."""
    app = create_app(pipe, Limits(max_batch=1))
    server, drawn = app.state.server, []
    draw = server.model.draw

    def slow(settings, inputs, seeds, abandoned):
        drawn.append(inputs[0].prompt)
        time.sleep(0.1)
        return draw(settings, inputs, seeds, abandoned)

    server.model.draw = slow

    async def three() -> list:
        def of(prompt: str) -> dict:
            return part(json.dumps({"prompt": prompt}).encode())

        first = asyncio.create_task(call(app, messages(of("a")), content_length="1"))
        while server.batcher.running == 0:
            await asyncio.sleep(0.005)
        second = call(app, messages(of("red"), 0.02, GONE), content_length="1")
        third = call(app, messages(of("blue")), content_length="1")
        return await asyncio.gather(first, second, third)

    first, _, third = asyncio.run(three())
    assert first[0]["status"] == third[0]["status"] == 200
    assert drawn == ["a", "blue"]
    assert counted(app, 499)


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\nX-Slow: "])
def test_a_request_that_does_not_begin_is_cut_off(monkeypatch, head):
    """Catches: connections that stay open for ever, each with a byte or none (Slowloris)."""
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.2)

    async def app(scope, receive, send):
        await asyncio.sleep(0.5)  # an answer that takes longer than the limit of heads
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def connect() -> tuple[bytes, bytes]:
        config = Config(app, http=run._Protocol, lifespan="off", log_config=None)
        config.load()
        loop = asyncio.get_running_loop()
        made = await loop.create_server(
            lambda: config.http_protocol_class(config, ServerState(), {}), "127.0.0.1", 0
        )
        port = made.sockets[0].getsockname()[1]
        slow, slow_writer = await asyncio.open_connection("127.0.0.1", port)
        slow_writer.write(head)
        whole, whole_writer = await asyncio.open_connection("127.0.0.1", port)
        whole_writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        try:
            return await asyncio.wait_for(asyncio.gather(slow.read(), whole.read()), 20)
        finally:
            slow_writer.close()
            whole_writer.close()
            made.close()

    slow, whole = asyncio.run(connect())
    assert slow == b"" and whole.startswith(b"HTTP/1.1 204")


def test_addresses():
    """Catches: a warning that is not given, and a traceback for an address that is taken."""
    with run.bind("127.0.0.1", 0) as bound:
        assert run.is_loopback(bound) and run.url_of(bound).startswith("http://127.0.0.1:")
        bound.listen()
        with pytest.raises(ValueError, match="--host, --port: cannot serve at 127.0.0.1:"):
            run.bind("127.0.0.1", bound.getsockname()[1])
    with run.bind("0.0.0.0", 0) as bound:
        assert not run.is_loopback(bound)
    with pytest.raises(ValueError, match="cannot serve at 256.1.1.1:1"):
        run.bind("256.1.1.1", 1)
