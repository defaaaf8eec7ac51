"""What no honest client sends: every answer is a 4xx in OpenAI's form, without a traceback, and in time."""

from __future__ import annotations

import io
import json
import struct
import zlib

import pytest
from PIL import Image

from dalle2_fast.serving.limits import Limits
from dalle2_fast.serving.store import PictureStore

GENERATE, EDITS, VARIATIONS = (f"/v1/images/{name}" for name in ("generations", "edits", "variations"))
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(pipe):
    from starlette.testclient import TestClient

    from dalle2_fast.serving.app import create_app

    limits = Limits(max_body=100_000, max_pixels=64 * 64, max_images=4, max_steps=9)
    with TestClient(create_app(pipe, limits)) as client:
        yield client


def refused(response, status: int, *words: str) -> dict:
    """The error of a response, which has that status and all words."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text and "\n" not in error["message"] and len(error["message"]) < 620
    for word in words:
        assert word in error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"a red ring"', b"\xff\xfe", b'{"prompt": "a", "n": NaN}', b"[" * 50_000,
     b'{"prompt": "a", "guidance": -Infinity}', b'{"n": ' + b"1" * 5000 + b"}", b'{"prompt": "a"} x'],
)  # fmt: skip
def test_malformed_json(client, body):
    """Catches: a parser's exception that becomes status 500, and NaN taken for a number."""
    refused(client.post(GENERATE, content=body, headers=JSON), 400, "body: expected a JSON object, got")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "prompt", "expected a value, got none"),
        ({"prompt": 3}, "prompt", "got 3"),
        ({"prompt": ["a"]}, "prompt", "got a list"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "\ud800"}, "prompt", "expected a valid string"),
        ({"prompt": "a ring " * 1500}, "prompt", "expected at most 1000 characters, got 10500"),
        ({"prompt": "a red rign"}, "prompt", "ring"),
        ({"prompt": "a", "negative_prompt": "sqare"}, "negative_prompt", "square"),
        ({"promt": "a"}, "promt", "did you mean prompt?"),
        ({"prompt": "a", "\ud800": 1}, "\ud800", "unknown field"),
        ({"prompt": "a", "n": "2"}, "n", "expected a valid integer, got '2'"),
        ({"prompt": "a", "n": True}, "n", "expected a valid integer"),
        ({"prompt": "a", "n": 1.5}, "n", "integer"),
        ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "a", "n": 5}, "n", "expected at most 4, got 5"),
        ({"prompt": "a", "n": 10**400}, "n", "n: expected"),
        ({"prompt": "a", "size": 32}, "size", "string"),
        ({"prompt": "a", "size": "33x33"}, "size", "expected one of 16x16, 32x32, auto, got '33x33'"),
        ({"prompt": "a", "size": "x" * 9999}, "size", "32x32"),
        ({"prompt": "a", "steps": 10}, "steps", "expected at most 9"),
        ({"prompt": "a", "guidance": "3"}, "guidance", "number"),
        ({"prompt": "a", "guidance": -0.5}, "guidance", "greater than or equal to 0"),
        ({"prompt": "a", "seed": -1}, "seed", "greater than or equal to 0"),
        ({"prompt": "a", "seed": 2**63}, "seed", "seed: expected"),
        ({"prompt": "a", "response_format": "file"}, "response_format", "'url' or 'b64_json'"),
        ({"prompt": "a", "output_format": "gif"}, "output_format", "'webp'"),
        ({"prompt": "a", "user": {"a": 1}}, "user", "got an object"),
    ],
)
def test_wrong_fields(client, fields, param, words):
    """Catches: a value of another type or range that is accepted, an error that does not name its field."""
    error = refused(client.post(GENERATE, content=json.dumps(fields), headers=JSON), 400, words)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param.encode("utf-8", "backslashreplace").decode()


def test_many_unknown_words_answer_soon_and_briefly(client):
    """Catches: an error message as long as the caption."""
    words = " ".join(f"wo{number}" for number in range(150))
    refused(client.post(GENERATE, json={"prompt": words}), 400, "unknown words", "...")


def test_other_models_routes_and_types(client):
    """Catches: an error of the framework in another form."""
    error = refused(client.post(GENERATE, json={"prompt": "a", "model": "dall-e-3"}), 404, "dall-e-2")
    assert error["code"] == "model_not_found"
    refused(client.post("/v1/images/generation", json={}), 404, "POST /v1/images/generation")
    refused(client.get(GENERATE), 405, "Method Not Allowed")
    refused(client.post(GENERATE, content=b"a", headers={"content-type": "text/plain"}), 415, "text/plain")
    refused(client.post(GENERATE, content=b"{}"), 415, "got none")
    refused(client.post(EDITS, json={}), 415, "expected multipart/form-data")
    assert 'route="unmatched"' in client.get("/metrics").text
    assert "/v1/images/generation\"" not in client.get("/metrics").text  # clients add no labels


def in_pieces(size: int):
    yield b'{"prompt": "'
    for _ in range(size // 1000):
        yield b"a" * 1000
    yield b'"}'


def test_huge_bodies(client):
    """Catches: a body without Content-Length that is read to its end, and one that is read before it is
    refused."""
    refused(client.post(GENERATE, content=b" " * 100_001, headers=JSON), 413, "bytes, got 100,001")
    refused(client.post(GENERATE, content=in_pieces(200_000), headers=JSON), 413, "got more")
    refused(client.post(VARIATIONS, files={"image": b"x" * 100_001}), 413, "at most 100,000 bytes")


def png_header(width: int, height: int) -> bytes:
    """A PNG file that promises so many pixels and has none."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def gif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "GIF")
    return file.getvalue()


def test_bad_images(client, image_file):
    """Catches: a decoder's exception that becomes status 500, and a bomb that is decoded."""
    whole = image_file(32)
    tall = io.BytesIO()
    Image.new("RGB", (32, 16)).save(tall, "PNG")
    for file, words in (
        (b"", "none of these"),
        (b"no image", "none of these"),
        (gif(), "none of these"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "none of these"),
        (whole[:60], "cannot be read"),
        (whole[:40] + b"\0" * 50, ""),
        (png_header(65, 64), "at most 4,096 pixels, got 65 x 64"),
        (png_header(2**31 - 1, 2**31 - 1), ""),
        (png_header(64, 64), "cannot be read"),
        (tall.getvalue(), "expected a square image, got 32 x 16"),
    ):
        error = refused(client.post(VARIATIONS, files={"image": file}), 400, "image: ", words)
        assert error["param"] == "image"


def test_bad_forms(client, image_file):
    """Catches: files and fields that are mixed up, forms without an end, charsets that do not exist."""
    image = {"image": image_file()}
    edit = {"prompt": "a red ring"}
    for form, files, param, words in (
        ({"image": "text", "n": "1"}, {"x": b""}, None, "image: expected a file, got text"),
        ({}, {"n": b"1", **image}, "n", "n: expected text, got a file"),
        ({}, {"imag": image["image"]}, "imag", "did you mean image?"),
        ({"n": ["1", "2"]}, image, "n", "n: expected once, got several"),
        ({"n": "one"}, image, "n", "integer"),
        ({"guidance": "nan"}, image, "guidance", "finite number"),
        ({"prompt": "a"}, image, "prompt", "unknown field"),
        ({"user": "x" * 70_000}, image, None, "malformed"),
        ({f"field{number}": "" for number in range(40)}, image, None, "malformed"),
        ({}, {"mask": b""}, "mask", "unknown file"),
    ):
        error = refused(client.post(VARIATIONS, data=form, files=files), 400, words)
        assert param is None or error["param"] == param
    only_mask = {"mask": image_file(hole=True)}
    refused(client.post(EDITS, data=edit, files=only_mask), 400, "image: expected a file")
    refused(client.post(EDITS, data=edit, files=image), 400, "expected an image with transparency")
    sizes = {**image, "mask": image_file(64, hole=True)}
    refused(client.post(EDITS, data=edit, files=sizes), 400, "expected the size of the image, 32 x 32")
    for kind, body in (
        ("multipart/form-data", b"--x"),
        ("multipart/form-data; boundary=x", b"no boundary"),
        (
            "multipart/form-data; boundary=x; charset=klingon",
            b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n1\r\n--x--\r\n',
        ),
    ):
        answer = client.post(VARIATIONS, content=body, headers={"content-type": kind})
        refused(answer, 400)


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\..\\x.png", "/etc/passwd", "a\0b", "x" * 5000])
def test_names_of_files_are_never_looked_at(client, image_file, name, tmp_path, monkeypatch):
    """Catches: an upload that is written under the name that the client gives."""
    monkeypatch.chdir(tmp_path)
    answer = client.post(VARIATIONS, files={"image": (name, image_file())})
    assert answer.status_code == 200 or len(name) > 4000 and answer.status_code == 400  # python-multipart
    assert not list(tmp_path.rglob("*"))


def test_no_picture_without_its_name(client):
    """Catches: names that can be guessed, that match in part, or that reach a file system."""
    made = client.post(GENERATE, json={"prompt": "a red ring", "n": 2}).json()["data"]
    first, second = (entry["url"].rpartition("/")[2] for entry in made)
    assert first != second and len(first) >= 43
    base = "/v1/images/files/"
    for name in (first[:-1], first.upper(), first.removesuffix(".png"), "", ".", "*", "0", f"..%2F{first}",
                 "..%2f..%2f..%2fetc%2fpasswd", "%00", first + "%00", "%2e%2e/app.py"):  # fmt: skip
        assert client.get(base + name).status_code == 404, name
    assert client.get(base + first).content != client.get(base + second).content
    for page in ("/metrics", "/openapi.json", "/health", "/v1/models"):
        assert first not in client.get(page).text


def test_the_store_forgets(monkeypatch):
    """Catches: a store that grows without end, and pictures that outlive their time."""
    now = [0.0]
    monkeypatch.setattr("dalle2_fast.serving.store.time.monotonic", lambda: now[0])
    store = PictureStore(max_bytes=250, seconds=10)
    names = [store.put(bytes(100), "image/png") for _ in range(5)]
    assert len(store) == 2 and store.bytes == 200
    assert [store.get(name) is not None for name in names] == [False, False, False, True, True]
    assert store.get(store.put(bytes(1000), "image/png")) is not None and len(store) == 1
    now[0] = 10.0
    assert store.get(names[-1]) is None and len(store) == 0 and store.bytes == 0
