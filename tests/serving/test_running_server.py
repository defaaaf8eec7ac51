"""`dalle2-fast serve` as a process: the official client, sockets, the log, and its end."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from dalle2_fast.cli import main

KEY = "secret-key"
GENERATE = "/v1/images/generations"


class Running(NamedTuple):
    process: subprocess.Popen
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=20) as answer:
            return answer.read().decode()

    def wait_for(self, path: str, text: str) -> None:
        deadline = time.monotonic() + 20
        while text not in (found := self.get(path)):
            assert time.monotonic() < deadline, found
            time.sleep(0.02)


@pytest.fixture(scope="module")
def running(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    pipe.save_pretrained(folder / "tiny")
    log = folder / "log"
    command = [sys.executable, "-m", "dalle2_fast", "serve", "--checkpoint", folder / "tiny",
               "--device", "cpu", "--dtype", "fp32", "--host", "0.0.0.0", "--port", "0", "--max-body", "1"]
    environment = os.environ | {"DALLE2_FAST_API_KEY": KEY, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    try:
        line = process.stdout.readline()
        found = re.match(r"serving at http://0\.0\.0\.0:(\d+) \(16 x 16, 32 x 32; cpu, float32\)", line)
        assert found, line + log.read_text()
        yield Running(process, int(found[1]), log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_official_client(running, image_file):
    """Catches: any difference from OpenAI's API that its own client sees."""
    openai = pytest.importorskip("openai", reason="the extra interop is not installed")
    client = openai.OpenAI(api_key=KEY, base_url=f"{running.url}/v1", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list()] == ["dalle2-fast"]
    assert client.models.retrieve("dall-e-2").owned_by == "dalle2_fast"
    made = client.images.generate(
        model="dall-e-2", prompt="a red ring", n=2, size="16x16", response_format="b64_json",
        extra_body={"seed": 1, "steps": 3},
    )  # fmt: skip
    first = base64.b64decode(made.data[0].b64_json)
    assert len(made.data) == 2 and Image.open(io.BytesIO(first)).size == (16, 16)
    assert made.data[0].seed == 1 and made.created <= time.time()

    holed = ("image.png", image_file(32, hole=True), "image/png")
    edited = client.images.edit(image=holed, mask=holed, prompt="a red ring", n=1)
    varied = client.images.create_variation(image=("image.png", image_file(), "image/png"), n=2)
    for answer in (edited, varied):
        with urllib.request.urlopen(answer.data[0].url, timeout=20) as file:
            assert Image.open(io.BytesIO(file.read())).size == (32, 32)

    with pytest.raises(openai.BadRequestError, match="nearest: ring") as caught:
        client.images.generate(prompt="a red rign")
    assert caught.value.param == "prompt" and caught.value.code == "invalid_prompt"
    with pytest.raises(openai.NotFoundError, match="dall-e-2"):
        client.images.generate(prompt="a red ring", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="quality"):
        client.images.generate(prompt="a red ring", quality="hd")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").images.generate(prompt="a red ring")
    with pytest.raises(openai.APIStatusError, match="at most 1,048,576 bytes"):
        client.images.create_variation(image=("image.png", bytes(2**20), "image/png"))


def head(path: str = GENERATE, *lines: str) -> bytes:
    common = ("Host: a", "Content-Type: application/json", f"Authorization: Bearer {KEY}")
    return "\r\n".join([f"POST {path} HTTP/1.1", *common, *lines, "", ""]).encode()


def exchange(port: int, *parts: bytes) -> bytes:
    """Send the parts and read until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        answer = b""
        try:
            for sent in parts:
                connection.sendall(sent)
            while received := connection.recv(65536):
                answer += received
        except ConnectionError:  # it no longer reads what it has refused
            pass
        return answer


def test_raw_sockets_and_the_log(running):
    """Catches: bodies that are waited for, a client whose end is not seen, secrets in the log."""
    answer = exchange(running.port, head(GENERATE, "Content-Length: 1000000000"))
    assert answer.startswith(b"HTTP/1.1 413") and b"got 1,000,000,000" in answer
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    answer = exchange(running.port, head(GENERATE, "Transfer-Encoding: chunked"), *[chunk] * 40)
    assert answer.startswith(b"HTTP/1.1 413") or answer == b""
    assert exchange(running.port, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    slow = json.dumps({"prompt": "a red ring", "n": 10, "steps": 100}).encode()
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(head(GENERATE, f"Content-Length: {len(slow)}") + slow)
        running.wait_for("/metrics", "dalle2_running 8.0")
    running.wait_for("/metrics", f'dalle2_requests_total{{route="{GENERATE}",status="499"}} 1.0')
    running.wait_for("/metrics", "dalle2_running 0.0")
    assert json.loads(running.get("/health")) == {"live": True, "ready": True}
    first, *lines = running.log.read_text().splitlines()
    assert "other machines can reach" not in first  # there is a key
    entries = [json.loads(line) for line in (first, *lines) if line.startswith("{")]
    assert len(entries) > 3 and {"time", "id", "client", "route", "status", "seconds"} <= set(entries[0])
    assert KEY not in running.log.read_text() and ".png" not in running.log.read_text()
    assert "Traceback" not in running.log.read_text()


def test_sigterm_finishes_what_runs(running):
    """Catches: a restart that loses requests, takes new ones, hangs, or ends with an error."""
    body = json.dumps({"prompt": "a red ring", "n": 8, "steps": 30}).encode()
    request = urllib.request.Request(
        running.url + GENERATE, body,
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )  # fmt: skip
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(urllib.request.urlopen, request, timeout=60)
        running.wait_for("/metrics", "dalle2_running 8.0")
        running.process.send_signal(signal.SIGTERM)
        assert len(json.load(answer.result())["data"]) == 8
    assert running.process.wait(30) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", running.port), timeout=5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "--port: expected a number from 0 to 65535, got '99999'"),
        (["--prot", "1"], "unknown option --prot; did you mean --port?"),
        (["--public-url", "draw.example"], "--public-url: expected http://HOST or https://HOST"),
        (["--max-queue", "2"], "max_queue: expected at least max_images = 10, got 2"),
        (["--api-key", "two words"], "--api-key: expected ASCII letters"),
        (["--host", "256.1.1.1"], "--host, --port: cannot serve at 256.1.1.1:8000"),
        (["--port", "0", "--checkpoint", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, message, capsys):
    """Catches: an option that is found to be wrong only after the weights are loaded, or with a traceback."""
    try:
        assert main(["serve", *words]) == 2
    except SystemExit as end:
        assert end.code == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
