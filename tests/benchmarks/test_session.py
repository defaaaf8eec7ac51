"""The GPU session: its dry run, its budgets, and what it writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.cases import registry
from benchmarks.jobs import session
from benchmarks.jobs.session_rows import MODULES, NEED_CUDA
from benchmarks.timing import report
from benchmarks.timing.provenance import ROOT
from benchmarks.timing.rows import Row, read_run

SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"
CASES = registry.load(MODULES)


def start(arguments: list, folder: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("stages", [("jobs", "profile"), ("ops", "losses", "report")])
def test_the_dry_run_runs_every_row(stages, tmp_path):
    """Catches a typo in a row, in a rival's call or in the script, before it costs minutes of a GPU."""
    pytest.importorskip("triton")
    pytest.importorskip("diffusers")
    table = (ROOT / "README.md").read_text().split(report.BEGIN)[1].split(report.END)[0]
    done = start([tmp_path, "--dry-run", *stages])
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(tmp_path / "session.jsonl")
    wanted = {(name, kind) for stage in stages for name in session.STAGES.get(stage, ())
              for kind in ("ours", *CASES[name].rivals)}  # fmt: skip
    timed = {(row["case"], row["implementation"]) for row in run["rows"]}
    absent = {(row["case"], row["implementation"]): row["absent"] for row in run["absent"]}
    assert timed | absent.keys() == wanted
    for (name, kind), why in absent.items():
        rival = CASES[name].rivals.get(kind)
        package = CASES[name].package
        assert why == rival or kind in NEED_CUDA or why == f"{package} is not installed", (name, kind, why)
    if "profile" in stages:
        assert "decoder-forward-batch-2.txt" in {path.name for path in (tmp_path / "profiles").iterdir()}
    if "report" in stages:
        assert len(list((tmp_path / "results").glob("*.md"))) == 1
    assert (ROOT / "README.md").read_text().split(report.BEGIN)[1].split(report.END)[0] == table


def answers(pipe, dry_run):
    """Instead of `serve`: rows that hang, that end the process and that leave it broken."""
    pipe.send(dict(bytes_per_second=1.0, flops_per_second=1.0))
    for _, name, kind in iter(pipe.recv, None):
        if name == "hangs":
            time.sleep(60)
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.send((Row(name, kind, seconds=1.0, rounds=os.getpid()), name == "breaks"))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Run rows with these answers: (number of failures, {name: row})."""
    fork = multiprocessing.get_context("fork")  # quicker than a new process
    monkeypatch.setattr(session.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(session, "serve", answers)
    monkeypatch.setattr(session, "ROW_SECONDS", 0.5)

    def run(*rows: tuple[str, str], seconds: float = 30.0) -> tuple[int, dict]:
        monkeypatch.setattr(session, "rows_of", lambda stage, dry_run: [(*row, False) for row in rows])
        path = tmp_path / "session.jsonl"
        failed = session.run(path, {"ops": seconds}, False)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == 1 + len(rows)
        return failed, {line["case"]: line for line in lines[1:]}

    return run


def test_a_row_that_hangs_is_stopped_alone(measured):
    """Catches a rival that takes the rest of the stage, and a process that is not replaced."""
    failed, rows = measured(("first", "ours"), ("hangs", "rival"), ("next", "ours"))
    assert failed == 0 and rows["hangs"]["absent"].startswith("was stopped after")
    assert rows["next"]["absent"] is None and rows["next"]["rounds"] != rows["first"]["rounds"]


def test_ours_may_not_hang(measured):
    """Catches a session that calls itself whole without our own figure."""
    failed, rows = measured(("hangs", "ours"), ("next", "ours"))
    assert failed == 1 and "it was stopped after" in rows["hangs"]["absent"]


def test_a_row_that_ends_the_process_is_a_failure_alone(measured):
    """Catches rows that are lost after a crash, and figures from a process whose GPU context is broken."""
    failed, rows = measured(("dies", "rival"), ("breaks", "ours"), ("next", "ours"), ("last", "ours"))
    assert failed == 1 and rows["dies"]["absent"].endswith("its process ended with SIGKILL")
    process = {name: row["rounds"] for name, row in rows.items()}
    assert process["breaks"] != process["next"] == process["last"]


def test_a_stage_ends_with_its_seconds(measured):
    """Catches a stage that takes the time of the next one, and rows that are dropped without a reason."""
    begin = time.monotonic()
    failed, rows = measured(("hangs", "rival"), ("next", "ours"), seconds=0.3)
    assert time.monotonic() - begin < 10
    assert failed == 0 and "no time was left" in rows["next"]["absent"]


def test_what_compiles_comes_last_in_its_stage():
    """Catches a compilation of minutes before rows that take a second."""
    for stage in session.STAGES:
        compiles = [row[2] for row in session.rows_of(stage, False)]
        assert compiles == sorted(compiles) and any(compiles)


def test_a_session_is_a_run_of_the_report(tmp_path):
    """Catches an absent row that hides a figure of the same file, and one that is lost."""
    best = dict(bytes_per_second=1e12, flops_per_second=1e12)
    machine = dict(cpu="CPU", threads=2, gpu="GPU 1", note="")
    rows = [Row("a", "ours", seconds=1e-3), Row("a", "eager", absent="not installed")]
    rows += [Row("a", "ours", absent="no time was left"), Row("b", "ours", absent="not installed")]
    about = dict(machine=machine, commit="1234567 with local changes", datetime="2026-01-02T03:04:05")
    lines = [about, *(row.to_json() | dict(stage="ops", ceilings=best) for row in rows)]
    path = tmp_path / "session.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report.read_runs([path])
    assert found["device"] == "GPU 1" and found["commit"] == "1234567 with local changes"
    assert [(row["case"], row["seconds"]) for row in found["rows"]] == [("a", 1e-3)]
    absent = [(row["case"], row["implementation"]) for row in found["absent"]]
    assert absent == [("a", "eager"), ("b", "ours")]
    path.write_text("")
    with pytest.raises(ValueError, match="expected a file of benchmarks.jobs.session"):
        report.read_runs([path])


def test_a_wrong_stage_is_named(capsys):
    wrong = {"tune": "expected one of jobs, ops, losses, got tune", "ops:x": "expected STAGE:SECONDS, got"}
    for argument, says in wrong.items():
        with pytest.raises(SystemExit) as stop:
            session.main(["out.jsonl", argument])
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_the_gpu_session_names_its_stages(tmp_path):
    """Catches a script that works from one folder only, and a path that was moved."""
    for folder, name in ((tmp_path, SCRIPT), (ROOT / "benchmarks", "./gpu_session.sh")):
        for arguments in ([], [tmp_path / "out", "tune"]):
            done = subprocess.run([name, *arguments], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 2 and "profile" in done.stderr
    text = SCRIPT.read_text()
    named = re.findall(r"\btests/\w+", text)
    named += [f"{module.replace('.', '/')}.py" for module in re.findall(r"-m (benchmarks[.\w]+)", text)]
    assert len(named) == 8 and all((ROOT / name).exists() for name in named)


def test_the_gpu_session_takes_no_stage_for_its_folder(tmp_path):
    """`gpu_session.sh check` ran everything and wrote into a folder called check."""
    for arguments in (["check"], ["report", "jobs"]):
        done = start(arguments, tmp_path)
        assert done.returncode == 2 and f"{arguments[0]} is a stage: expected the folder OUT" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_gpu_session_rewrites_the_readme_only_if_asked(tmp_path):
    """By default it rewrote that of whoever ran it."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    for stages, expected in (([], False), (["report"], True)):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = start([tmp_path / "out", *stages], PYTHON=str(python))
        assert done.returncode == 0, done
        assert ("benchmarks.timing.report" in (tmp_path / "calls").read_text()) == expected
