"""Training on own data of any kind, with background processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from dalle2_fast.cli import main
from dalle2_fast.training.weights import load_weights
from tests.data.pairs.making import write_pictures, write_shards


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def words(out, data, *more):
    options = ["--preset", "tiny", "--steps", "4", "--batch-size", "4", "--device", "cpu", "--quiet"]
    return ["train", "clip", *options, "--out", str(out), "--data", str(data), *map(str, more)]


def weights(out):
    return load_weights(out / "clip" / "model.safetensors")[1]


def test_workers_change_no_weight_and_a_paused_run_goes_on(tmp_path):
    """Catches: a run on a folder of pictures that fails; workers that change the batches or the noise; a
    resumed run with other batches."""
    data = write_pictures(tmp_path / "data", 30)
    assert main(words(tmp_path / "a", data, "--workers", 0)) == 0
    assert main(words(tmp_path / "b", data, "--pause-after", 0, "--workers", 1)) == 0
    assert main(words(tmp_path / "b", data, "--resume", "--workers", 2)) == 0
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_with_the_older_order_says_so_once(tmp_path, capsys):
    """Catches: a run of an older release that goes on with other batches without a word, or is refused."""
    data = write_shards(tmp_path / "data", [12])
    assert main(words(tmp_path / "run", data, "--pause-after", 0)) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["run"]["data"]["order"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main(words(tmp_path / "run", data, "--resume", "--pause-after", 0)) == 0
    assert "samples in another order" in capsys.readouterr().out
    assert main(words(tmp_path / "run", data, "--resume")) == 0
    assert "another order" not in capsys.readouterr().out


def test_commands_need_permission(tmp_path, capsys):
    data = write_shards(tmp_path / "data", [12])
    command = f"pipe:cat {data}/00000.tar; touch {tmp_path}/ran"
    assert main(words(tmp_path / "run", command)) == 2
    assert "--allow-pipe" in capsys.readouterr().err and not (tmp_path / "ran").exists()
    assert main(words(tmp_path / "run", data, "--workers", -1)) == 2
    assert "--workers: expected at least 0, got -1" in capsys.readouterr().err
    pytest.importorskip("webdataset")
    assert main(words(tmp_path / "run", command, "--allow-pipe", "--steps", 1)) == 0
    assert (tmp_path / "ran").exists()


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="needs ps and /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_process_and_no_lock(tmp_path, number):
    """Catches: Ctrl-C that kills the background processes before the state is saved; processes that outlive
    a killed run, and hold the lock of its folder."""
    data, out = write_pictures(tmp_path / "data", 30), tmp_path / "run"
    command = words(out, data, "--workers", 2, "--minutes", 5)
    command.remove("--steps"), command.remove("4")
    run = subprocess.Popen([sys.executable, "-m", "dalle2_fast", *command], start_new_session=True)
    try:
        log = out / "clip" / "log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = children(run.pid)
        assert len(workers) >= 2
        os.killpg(run.pid, number) if number == signal.SIGINT else run.kill()
        assert run.wait(60) == (128 + number if number == signal.SIGINT else -number)
    finally:
        run.kill()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    assert main(words(out, data, "--resume", "--override", "--pause-after", 0)) == 0
