"""The thread that draws: order, progress, stopping, errors."""

from __future__ import annotations

import threading

import pytest

from dalle2_fast.demo.worker import Stopped, Worker


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.stop()


def test_states_of_a_drawing(worker, studio):
    """Catches: steps without their preview, a preview of another stage's size, states after the end."""
    seen = []

    def draw(job):
        report = job._report
        job._report = lambda state: (seen.append(state), report(state))
        return studio.draw("a red ring", number=2, seed="0", steps=2, guidance=1.0)(job)

    job = worker.start(draw)
    shown = list(job.states())
    assert len(job.result().pictures) == 2
    assert [(state.stage, state.step, state.steps) for state in seen if state.stage == "decoder"][-1] == (
        "decoder", 2, 2
    )  # fmt: skip
    sizes = [tuple(state.images.shape) for state in seen if state.images is not None]
    assert sizes[0] == (2, 3, 16, 16) and sizes[-1] == (2, 3, 32, 32)
    assert shown[-1] in seen and len(shown) <= len(seen)


def test_the_last_state_of_a_fast_job_is_shown(worker):
    """Catches: a job that ends before its page looks, and shows nothing."""
    job = worker.start(lambda job: list(job.progress("decoder", range(3), 3)))
    job.result()
    worker.start(lambda job: None).result()  # the job before has ended for its page, too
    assert [(state.step, state.steps) for state in job.states()] == [(3, 3)]


def test_no_preview(worker, pipe):
    from dalle2_fast.demo.studio import Studio

    studio = Studio(pipe, preview=False)
    job = worker.start(studio.draw("a ring", number=1, seed="0", steps=2, guidance=1.0))
    assert all(state.images is None for state in job.states())


def test_jobs_wait_for_each_other_and_say_so(worker):
    """Catches: two drawings at once, and a page that waits in silence."""
    first_runs, go_on, order = threading.Event(), threading.Event(), []

    def first(job):
        first_runs.set()
        go_on.wait(20)
        order.append(1)

    jobs = [worker.start(first), worker.start(lambda job: order.append(2))]
    assert first_runs.wait(20)
    states = jobs[1].states(every=0.01)
    assert next(states).waiting == 1
    go_on.set()
    assert not [state for state in states if state.stage]
    jobs[1].result()
    assert order == [1, 2]


def test_a_stopped_job_ends_at_its_next_step_and_the_next_one_begins(worker):
    """Catches: a stopped job that draws on, and one that blocks those behind it."""
    began, steps = threading.Event(), []

    def endless(job):
        for step in job.progress("decoder", iter(int, 1)):
            steps.append(step)
            began.set()

    running, waiting = worker.start(endless), worker.start(endless)
    assert began.wait(20)
    waiting.stop()
    with pytest.raises(Stopped):
        waiting.result()
    running.stop()
    with pytest.raises(Stopped):
        running.result()
    assert worker.start(lambda job: 3).result() == 3


def test_an_error_of_a_job_is_its_result(worker):
    def fail(job):
        raise FloatingPointError("decoder: the result is not finite")

    job = worker.start(fail)
    assert list(job.states()) == []
    with pytest.raises(FloatingPointError):
        job.result()
