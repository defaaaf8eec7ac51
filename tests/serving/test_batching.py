"""What waits is drawn together, and nobody's picture depends on who else waits."""

from __future__ import annotations

import base64
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from dalle2_fast.serving.batching import Abandoned, Batcher, Closed, Picture, QueueFull
from dalle2_fast.serving.limits import Limits

GENERATE = "/v1/images/generations"


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


class Model:
    """Draws a picture by returning its inputs, when it may."""

    def __init__(self):
        self.batches, self.may = [], threading.Event()

    def draw(self, settings, inputs, seeds, abandoned):
        self.batches.append((settings, inputs))
        while not self.may.wait(0.005):
            if abandoned():
                raise Abandoned
        if "poison" in inputs:
            raise RuntimeError("poison")
        return inputs


@contextmanager
def batcher(model: Model, capacity: int = 3, **options):
    made = Batcher(model.draw, lambda settings: capacity, **options)
    try:
        yield made
    finally:
        model.may.set()
        made.close()


def waiting(settings: str, *inputs: str) -> list[Picture]:
    return [Picture(settings, each, seed=0) for each in inputs]


def test_batches_have_equal_settings_and_the_oldest_goes_first():
    """Catches: settings that are mixed, a batch beyond its capacity, and one that overtakes for ever."""
    model = Model()
    with batcher(model) as queue:
        first = waiting("A", "0")
        queue.submit(first)
        wait_for(lambda: queue.running == 1)
        rest = [*waiting("A", "1"), *waiting("B", "2", "3"), *waiting("A", "4", "5", "6")]
        queue.submit(rest)
        assert queue.waiting == 6
        model.may.set()
        assert [picture.future.result(20) for picture in first + rest] == list("0123456")
    assert model.batches == [("A", ["0"]), ("A", ["1", "4", "5"]), ("B", ["2", "3"]), ("A", ["6"])]


def test_a_batch_waits_for_others_until_it_is_full():
    """Catches: a wait that does not end when the batch is full, and one that does not take place."""
    model = Model()
    model.may.set()
    with batcher(model, capacity=2, max_wait=30) as queue:
        pictures = waiting("A", "0", "1")
        queue.submit(pictures[:1])
        time.sleep(0.05)
        assert queue.waiting == 1 and not model.batches
        queue.submit(pictures[1:])
        assert [picture.future.result(20) for picture in pictures] == ["0", "1"]
    assert len(model.batches) == 1


def test_one_failure_is_not_that_of_the_others():
    """Catches: a request that makes those fail with which it shares a batch."""
    model = Model()
    with batcher(model, max_wait=0.05) as queue:
        pictures = waiting("A", "0", "poison", "2")
        queue.submit(pictures)
        model.may.set()
        assert pictures[0].future.result(20) == "0" and pictures[2].future.result(20) == "2"
        with pytest.raises(RuntimeError, match="poison"):
            pictures[1].future.result(20)
        assert queue.alive


def test_a_full_queue_takes_all_pictures_of_a_request_or_none():
    """Catches: a queue that grows, half a request in it, and room that a cancelled picture keeps."""
    model = Model()
    with batcher(model, capacity=1, max_queue=3) as queue:
        queue.submit(waiting("A", "0"))
        wait_for(lambda: queue.running == 1)
        two = waiting("A", "1", "2")
        queue.submit(two)
        with pytest.raises(QueueFull):
            queue.submit(waiting("A", "3", "4"))
        assert queue.waiting == 2
        queue.cancel(two)
        queue.submit(waiting("A", "5", "6", "7"))
        assert queue.waiting == 3 and two[0].future.cancelled() and queue.retry_after >= 1


def test_what_nobody_waits_for_stops_between_steps():
    """Catches: a model that is busy for clients that are gone."""
    model = Model()
    with batcher(model, max_wait=0.05) as queue:
        pictures = waiting("A", "0", "1")
        queue.submit(pictures)
        wait_for(lambda: queue.running == 2)
        queue.cancel(pictures[:1])
        time.sleep(0.05)
        assert queue.running == 2  # one of them is still wanted
        queue.cancel(pictures[1:])
        wait_for(lambda: queue.running == 0)
        assert not model.may.is_set()


def test_close_fails_all_that_is_left():
    """Catches: a server that hangs at its end."""
    model = Model()
    with batcher(model, capacity=1) as queue:
        pictures = waiting("A", "0", "1")
        queue.submit(pictures)
        wait_for(lambda: queue.running == 1)
        queue.close()
        for picture in pictures:
            with pytest.raises(Closed):
                picture.future.result(20)
        with pytest.raises(Closed):
            queue.submit(waiting("A", "2"))
        assert not queue.alive


# ------------------------------------------------------------------------------------------ in the server


@contextmanager
def held(client):
    """The model of the server waits until the block ends; yields what it draws meanwhile."""
    server = client.app.state.server
    draw, may, sizes = server.model.draw, threading.Event(), []

    def slow(settings, inputs, seeds, abandoned):
        sizes.append(len(inputs))
        may.wait(20)
        return draw(settings, inputs, seeds, abandoned)

    server.model.draw = slow
    try:
        yield sizes
    finally:
        may.set()


def ask(client, prompt: str, seed: int = 0, **fields):
    body = {"prompt": prompt, "seed": seed, "response_format": "b64_json", **fields}
    return client.post(GENERATE, json=body)


def pixels(response) -> np.ndarray:
    assert response.status_code == 200, response.text
    files = [base64.b64decode(entry["b64_json"]) for entry in response.json()["data"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)), int) for file in files])


def test_a_picture_alone_equals_the_same_in_a_batch(connect):
    """Catches: a batch in which a picture depends on its neighbours, their captions, their seeds or n."""
    client = connect(Limits(max_batch=8))
    server = client.app.state.server
    asked = [("a red ring", 1, 1), ("a blue square", 2, 1), ("a blue square", 3, 2), ("red", 1, 2)]
    alone = [pixels(ask(client, prompt, seed, n=n)) for prompt, seed, n in asked]
    with ThreadPoolExecutor() as pool:
        with held(client) as sizes:
            first = pool.submit(ask, client, "a")
            wait_for(lambda: server.batcher.running == 1)
            asking = [pool.submit(ask, client, prompt, seed, n=n) for prompt, seed, n in asked]
            wait_for(lambda: server.batcher.waiting == 6)
        together = [pixels(each.result()) for each in asking]
        pixels(first.result())
    assert sizes == [1, 6]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1  # of 255
    assert np.abs(alone[0][0] - alone[1][0]).max() > 1  # what the comparison can see
    assert np.abs(alone[0][0] - alone[3][0]).max() > 1


def test_a_full_queue_is_429_and_a_late_picture_504(connect):
    """Catches: requests that pile up, and those that wait for ever."""
    client = connect(Limits(max_batch=1, max_queue=2, max_images=2, timeout=2.0))
    server = client.app.state.server
    with ThreadPoolExecutor() as pool:
        with held(client):
            first = pool.submit(ask, client, "a")
            wait_for(lambda: server.batcher.running == 1)
            second = pool.submit(ask, client, "a", n=2)
            wait_for(lambda: server.batcher.waiting == 2)
            third = ask(client, "a")
            assert third.status_code == 429 and int(third.headers["retry-after"]) >= 1
            assert third.json()["error"]["type"] == "rate_limit_error"
            for late in (first, second):
                assert late.result().status_code == 504
            assert server.batcher.waiting == 0  # what nobody waits for is dropped
        assert ask(client, "a").status_code == 200


def test_errors_of_the_model(connect, caplog):
    """Catches: a traceback in an answer, and a fault of the program that no log shows."""
    client = connect()
    model = client.app.state.server.model
    model.draw = lambda *_: 1 / 0
    answer = ask(client, "a")
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" not in answer.text and "ZeroDivisionError" in caplog.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]

    def refuse(*_):
        raise ValueError("guidance: expected 1 to 4, got 9")

    model.draw = refuse
    answer = ask(client, "a", guidance=9)
    assert answer.status_code == 400 and "got 9" in answer.json()["error"]["message"]
