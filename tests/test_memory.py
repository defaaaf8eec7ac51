"""keep_freed_memory: what it changes under glibc, that it is bounded, and who calls it."""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import dalle2_fast
from dalle2_fast import cli
from dalle2_fast import memory as home

GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
needs_glibc = pytest.mark.skipif(not GLIBC, reason="malloc is not glibc's")

# Blocks of 1 to 64 MB that are written, and freed in another order; prints page faults and peak memory in KB,
# after the first tenth of the rounds and after all of them.
ROUNDS = """
import json, random, resource
from dalle2_fast import keep_freed_memory
assert {call} is {kept}
draw, found = random.Random(0), []
for round in range({rounds}):
    live = [b"x" * (draw.choice((1, 3, 17, 40, 64)) << 20) for _ in range(8)]
    draw.shuffle(live)
    while live:
        live.pop()
    if round in ({rounds} // 10, {rounds} - 1):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        found.append((usage.ru_minflt, usage.ru_maxrss))
print(json.dumps(found))
"""


def run(call: str, kept: bool | None, rounds: int) -> list[list[int]]:
    """In a process of its own, because the settings are for good."""
    code = ROUNDS.format(call=call, kept=kept, rounds=rounds)
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


@needs_glibc
def test_blocks_come_back_without_page_faults_and_peak_memory_is_bounded():
    """Catches: settings that glibc refuses or ignores, and blocks that are kept but not used again."""
    (early, early_peak), (late, late_peak) = run("keep_freed_memory()", True, rounds=40)
    (early_without, _), (late_without, _) = run("None", None, rounds=10)
    assert (late - early) / 35 < (late_without - early_without) / 8 / 20  # per round
    assert late_peak < 1.5 * early_peak


FLAGS = """
import re
from dalle2_fast import keep_freed_memory
assert keep_freed_memory()
ranges = re.split(r"^(?=\\w+-\\w+ )", open("/proc/self/smaps").read(), flags=re.MULTILINE)
print([" hg" in text.split("VmFlags:")[1] for text in ranges if "[heap]" in text])
"""


@needs_glibc
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages here")
def test_the_heap_may_use_large_pages():
    """Catches a request for another range of addresses than the heap's, which the system accepts silently."""
    done = subprocess.run([sys.executable, "-c", FLAGS], capture_output=True, text=True, check=True)
    assert "True" in done.stdout


@pytest.mark.parametrize("missing", ["platform", "libc"])
def test_other_allocators_are_left_alone(monkeypatch, missing):
    """Catches: glibc's numbers of settings that reach another malloc, and an answer that is not true."""
    if missing == "platform":
        monkeypatch.setattr(home.sys, "platform", "darwin")
        monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library was asked"))
    else:
        monkeypatch.setattr(home.sys, "platform", "linux")
        monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # musl: without gnu_get_libc_version
    assert dalle2_fast.keep_freed_memory() is False


def test_the_command_line_asks_for_it_and_a_caller_of_main_does_not(monkeypatch, capsys):
    """Catches: a command that runs without it, and a host program whose allocator is changed unasked."""
    calls = []
    monkeypatch.setattr(home, "keep_freed_memory", lambda: calls.append(1))
    missing = ["vocabulary", "--checkpoint", "no/such/folder"]
    assert cli.main(missing) == 2 and calls == []
    monkeypatch.setattr(sys, "argv", ["dalle2-fast", *missing])
    assert cli.main() == 2 and calls == [1]
