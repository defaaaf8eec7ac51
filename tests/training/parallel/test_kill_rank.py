"""One of several processes is killed, all are restarted, and no bit differs; kill.py tries more instants."""

from __future__ import annotations

from tests.training.parallel.kill import run


def test_no_kill_of_one_process_changes_a_bit():
    """Catches: a state that is renamed before all processes have written it, buckets of gradients that are
    other ones after a restart, processes that wait for one that was killed."""
    lines: list[str] = []
    assert run(2, seed=1, world_size=4, stages=("clip",), parallel="ddp", report=lines.append) == 0, lines
