"""The routes of OpenAI's images API, in-process: what a correct request gets."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from dalle2_fast.data.images import from_pil, to_pil
from dalle2_fast.serving.limits import Limits
from dalle2_fast.serving.model import picture_seeds

GENERATE = "/v1/images/generations"
CAPTION = "a red ring"


def pictures(response) -> list[Image.Image]:
    assert response.status_code == 200, response.text
    files = [base64.b64decode(entry["b64_json"]) for entry in response.json()["data"]]
    return [Image.open(io.BytesIO(file)) for file in files]


def ask(client, **fields):
    return client.post(GENERATE, json={"prompt": CAPTION, "response_format": "b64_json", **fields})


def difference(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(np.asarray(first, int) - np.asarray(second, int)).max())


def test_pictures_are_those_of_the_pipeline(client, pipe):
    """Catches: a seed, a size or a setting that does not reach the pipeline, and mixed-up pictures."""
    options = dict(steps=3, guidance=1.5, negative_prompt="a blue square")
    answer = ask(client, n=2, seed=5, size="16x16", **options)
    made = pictures(answer)
    assert answer.json()["size"] == "16x16" and answer.json()["output_format"] == "png"
    seeds = [entry["seed"] for entry in answer.json()["data"]]
    assert seeds == picture_seeds(5, 2)
    for seed, picture in zip(seeds, made, strict=True):
        expected = to_pil(pipe.generate(CAPTION, 1, seed=seed, size=16, **options).images)[0]
        assert difference(picture, expected) <= 1
        assert difference(pictures(ask(client, seed=seed, size="16x16", **options))[0], picture) <= 1
    assert difference(*made) > 1
    assert difference(made[0], pictures(ask(client, seed=5, size="16x16"))[0]) > 1


def test_defaults_are_the_largest_size_and_a_new_seed(client):
    """Catches: the same picture for everybody who names no seed, and a default other than "auto"."""
    first, second = ask(client), ask(client, size="auto", user="someone", model="dall-e-2", n=None)
    assert pictures(first)[0].size == pictures(second)[0].size == (32, 32)
    assert first.json()["data"][0]["seed"] != second.json()["data"][0]["seed"]


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats_and_urls(client, kind, name):
    """Catches: a format that is ignored, a URL that leads nowhere, and a picture that a proxy may keep."""
    assert pictures(ask(client, output_format=kind))[0].format == name
    answer = client.post(GENERATE, json={"prompt": CAPTION, "output_format": kind})
    url = answer.json()["data"][0]["url"]
    assert url.startswith("http://testserver/v1/images/files/")
    found = client.get(url.removeprefix("http://testserver"))
    assert found.headers["content-type"] == f"image/{kind}"
    assert found.headers["cache-control"].startswith("private")
    assert Image.open(io.BytesIO(found.content)).format == name


def test_public_url_and_a_hostile_host_header(connect):
    """Catches: URLs that clients behind a proxy cannot follow, and a header that is copied unseen."""
    fields = {"prompt": CAPTION}
    behind = connect(public_url="https://draw.example/").post(GENERATE, json=fields)
    assert behind.json()["data"][0]["url"].startswith("https://draw.example/v1/images/files/")
    hostile = connect().post(GENERATE, json=fields, headers={"host": 'evil.example/"><script>'})
    assert hostile.status_code == 200 and "script" not in hostile.text


def test_edits_repaint_what_is_transparent(client, image_file):
    """Catches: a mask with the wrong sense, and a kept part that changes."""
    form = {"prompt": CAPTION, "response_format": "b64_json", "n": "2", "seed": "1", "steps": "2"}
    opaque, holed = image_file(64), image_file(64, hole=True)
    with_mask = client.post("/v1/images/edits", data=form, files={"image": opaque, "mask": holed})
    without = client.post("/v1/images/edits", data=form, files={"image": ("a.png", holed)})
    for made in (pictures(with_mask), pictures(without)):
        assert len(made) == 2
        for picture in made:
            values = np.asarray(picture)
            assert (values[:, 17:] == (255, 0, 0)).all() and (values[:, :15] != (255, 0, 0)).any()


def test_edits_equal_the_pipeline(client, pipe, image_file):
    """Catches: an edit that leaves out the caption, the mask or the seed."""
    form = {"prompt": CAPTION, "response_format": "b64_json", "seed": "3"}
    holed = image_file(32, hole=True)
    made = pictures(client.post("/v1/images/edits", data=form, files={"image": holed}))[0]
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    image = from_pil(Image.new("RGB", (32, 32), "red"))
    image[..., :16] = 0  # the colour of the transparent pixels
    expected = pipe.inpaint(image, mask, CAPTION, 1, seed=3)
    assert difference(made, to_pil(expected.images)[0]) <= 1


def test_variations_equal_the_pipeline(client, pipe, image_file):
    """Catches: an image that is changed on its way."""
    form = {"response_format": "b64_json", "seed": "3", "size": "16x16"}
    made = pictures(client.post("/v1/images/variations", data=form, files={"image": image_file(kind="WEBP")}))
    source = Image.open(io.BytesIO(image_file(kind="WEBP"))).convert("RGB")
    expected = pipe.variations(source, 1, seed=3, size=16)
    assert difference(made[0], to_pil(expected.images)[0]) <= 1


def test_models_health_and_metrics(client):
    """Catches: counters that stand still, and a health that is always good."""
    assert client.get("/v1/models").json()["data"][0]["id"] == "dalle2-fast"
    assert client.get("/v1/models/dall-e-2").status_code == 200
    assert client.get("/v1/models/dall-e-9").json()["error"]["code"] == "model_not_found"
    ask(client, n=3)
    ask(client, n=99)
    text = client.get("/metrics").text
    for line in (
        f'dalle2_requests_total{{route="{GENERATE}",status="200"}} 1.0',
        f'dalle2_requests_total{{route="{GENERATE}",status="400"}} 1.0',
        f'dalle2_images_total{{route="{GENERATE}"}} 3.0',
        "dalle2_queue_length 0.0",
        "dalle2_batch_size_sum 3.0",
        'dalle2_stage_seconds_count{stage="upsampler"} 1.0',
    ):
        assert line in text
    assert client.get("/health").json() == {"live": True, "ready": True}
    client.app.state.server.batcher.close()
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == client.get("/health").status_code == 503
    assert ask(client).status_code == 503


def test_the_key_is_needed_where_pictures_are_made(connect):
    """Catches: a route of the API that forgets the key, and URLs of pictures that need it."""
    client = connect(api_key="secret")
    for method, path in (("POST", GENERATE), ("POST", "/v1/images/edits"), ("GET", "/v1/models")):
        for headers in ({}, {"Authorization": "Bearer Secret"}, {"Authorization": "Basic secret"}):
            refused = client.request(method, path, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
    answer = client.post(GENERATE, json={"prompt": CAPTION}, headers={"Authorization": "Bearer secret"})
    url = answer.json()["data"][0]["url"].removeprefix("http://testserver")
    assert client.get(url).status_code == 200 and client.get("/health").status_code == 200


def test_the_page_of_the_api_needs_no_other_host(client):
    """Catches: FastAPI's pages, which load scripts from a CDN, and a description without the fields."""
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
    paths = client.get("/openapi.json").json()["paths"]
    body = paths["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "mask", "prompt", "seed"} <= set(body["properties"])


def test_limits_that_cannot_be():
    """Catches: a queue that holds no whole request, and a limit of nothing."""
    with pytest.raises(ValueError, match="max_queue: expected at least max_images = 10, got 2"):
        Limits(max_queue=2)
    with pytest.raises(ValueError, match="timeout: expected more than 0, got nan"):
        Limits(timeout=float("nan"))
