"""The registry of the benchmarks without a GPU: each case computes the right thing at a tiny size, and the
bytes add up. On a GPU the same check runs at the real size before a case is timed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.cases import registry
from benchmarks.cases.group_norm_silu import decoder_norms
from benchmarks.jobs.session import STAGES
from benchmarks.timing import report
from benchmarks.timing.agreement import check, ours, results_of
from benchmarks.timing.rows import Row

# Each case for the CPU has one for GPUs that is the same at a tiny size.
CASES = {name: case for name, case in registry.load().items() if case.device == "cuda"}
OPS = [name for name, case in CASES.items() if "eager" in case.rivals]
# Those of a GPU session run in its dry run, which makes the same check: test_session.py.
WHOLE = [name for name, case in CASES.items() if "reference" in case.rivals and name not in STAGES["jobs"]]


@pytest.mark.parametrize("name", OPS)
def test_ours_and_eager_agree_with_the_truth(name, kernel_device):
    case = CASES[name]
    inputs = case.make(kernel_device, torch.float32, True)
    check(case, "ours", ours(case, "fused"), inputs)
    check(case, "eager", case.rivals["eager"], inputs)


@pytest.mark.parametrize("name", WHOLE)
def test_networks_and_jobs_of_other_packages_do_the_same(name):
    """Catches a wrong argument of diffusers' or open_clip's networks, which have our weights."""
    case = CASES[name]
    inputs = case.make("cpu", torch.float32, True)
    check(case, "ours", ours(case, "fused"), inputs)
    for kind, rival in case.rivals.items():
        if not isinstance(rival, str) and not getattr(rival, "compiles", False):
            check(case, kind, rival, inputs)


def test_what_is_varied_is_there():
    """Catches a variation of a constant, a kernel's source or a case that was renamed or removed."""
    pytest.importorskip("triton")
    from benchmarks.timing.variations import variations

    for name, _, changes in variations():
        assert name in CASES
        assert all(hasattr(target, attribute) for target, attribute, _ in changes)


def test_both_pipelines_evaluate_the_same_rows():
    """Catches a rival that runs fewer steps, makes fewer images or has no guidance."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from benchmarks.cases import generation

    case = CASES["caption to 256 px, 4 images"]
    pipe, images = case.make("cpu", torch.float32, True).values()
    theirs = generation.unclip_pipeline(pipe, False)
    counts = []
    for nets in ((pipe.decoder.unet, pipe.upsampler.unet, pipe.upsampler.last_unet),
                 (theirs.decoder, theirs.super_res_first, theirs.super_res_last)):  # fmt: skip
        rows = dict.fromkeys(range(3), 0)
        for index, net in enumerate(nets):
            def count(module, args, kwargs, index=index, rows=rows):
                rows[index] += len(kwargs["sample"] if "sample" in kwargs else args[0])

            net.register_forward_pre_hook(count, with_kwargs=True)
        counts.append(rows)
    generation.generate_images("fused", pipe, images)
    generation.rival_images(theirs, generation.CAPTION, images, pipe.sampling)
    assert counts[0] == counts[1] == {0: 3 * 2 * images, 1: 2 * images, 2: images}


def test_every_rival_is_there_or_says_why():
    """Catches a rival that is dropped silently: a case names a function or a reason."""
    for name, case in registry.CASES.items():
        for kind, rival in case.rivals.items():
            assert callable(rival) or (isinstance(rival, str) and rival), f"{name}: {kind}"
        assert set(case.unshared_weights) <= set(case.rivals)
    with pytest.raises(ValueError, match="a second case"):
        registry.add(next(iter(CASES.values())))


def test_goals_are_held_against_what_was_measured():
    """Catches a goal wrongly reported as met, and a goal in a row that has no figure for it."""
    best = dict(bytes_per_second=4e9, flops_per_second=1e12)
    goals = dict(target_us=100.0, wanted_share=0.5, wanted_peak=10**6, wanted_launches=1)
    row = Row("case", "ours", seconds=9e-5, peak_bytes=2 * 10**6, launches=1, **goals)
    row.set_rates(moved=90_000, flops=0, images=3, best=best)
    assert row.bytes_per_second == pytest.approx(1e9) and row.images_per_second == pytest.approx(3 / 9e-5)
    assert row.goals() == [("100 us", True), ("50% of best", False), ("1 MB", False), ("1 kernel", True)]
    rival = Row("case", "eager", ours_is_faster=1.9, wanted_factor=2.0, **goals)
    assert rival.goals() == [("2x", False)]
    assert Row("case", "eager", wanted_factor=2.0).goals() == []
    assert Row("case", "ours", absent="needs a CUDA device", **goals).goals() == []


def test_what_is_wrong_is_not_timed():
    case = CASES["cross-attention forward masked"]
    inputs = case.make("cpu", torch.float32, True)
    right = ours(case, "reference")
    check(case, "ours", right, inputs)
    with pytest.raises(AssertionError, match="output 0: error"):
        check(case, "ours", lambda **inputs: 1.01 * right(**inputs), inputs)
    factors = iter([1.0, 1.0 + 1e-6])
    with pytest.raises(AssertionError, match="output 0: other bits the second time"):
        check(case, "ours", lambda **inputs: next(factors) * right(**inputs), inputs)
    check(case, "rival", lambda **inputs: 1.01 * right(**inputs), inputs)
    with pytest.raises(AssertionError, match="rival: output 0 is off by .*: not the same formula"):
        check(case, "rival", lambda **inputs: 1.1 * right(**inputs), inputs)


@pytest.mark.parametrize("name", OPS)
def test_bytes_are_those_of_the_inputs_and_outputs(name):
    """Catches a lower bound of bytes, and so a share of the copy's speed, that belongs to other shapes."""
    case = CASES[name]
    if "norms of the decoder" in name:
        counted = sum(2 * 2 * 2 * math.prod(shape) for shape, _, _ in decoder_norms())
        assert len(decoder_norms()) == 95
    else:
        inputs = case.make("meta", torch.bfloat16, False)
        counted = sum(bytes_of(value) for value in inputs.values())
        if not case.backward:
            with torch.no_grad():
                counted += sum(map(bytes_of, results_of(case, ours(case, "reference"), inputs).values()))
    if case.backward:
        return  # a kernel may choose what its backward pass reads again
    unread = 0 if "step" not in name else bytes_of(inputs["output"]) - case.bytes // 6 * 3
    if "dynamic" in name:
        unread = 0
    assert counted - unread == pytest.approx(case.bytes, rel=0.02)


def bytes_of(value) -> int:
    return 0 if value is None else value.numel() * value.element_size()


def run_file(path: Path, seconds: dict[tuple[str, str], float], gpu: str = "GPU 1", absent=()) -> Path:
    """A file as pytest-benchmark writes it. ours_is_faster is twice the ratio of the times, so that the test
    can tell them apart."""
    best = dict(bytes_per_second=4e9, flops_per_second=5e12)
    rows = []
    for (case, kind), value in seconds.items():
        row = Row(case, kind, seconds=value, spread=0.05, rounds=30, peak_bytes=10**6, shape=[4])
        row.set_rates(moved=int(value * 1e9), flops=int(value * 2e12), images=0, best=best)
        row.target_us = 100.0 if kind == "ours" else None
        row.wanted_factor = 2.0 if kind == "eager" else None
        if kind != "ours":
            row.ours_is_faster = 2 * value / seconds.get((case, "ours"), 9e-5)
        rows.append(dict(extra_info=row.to_json() | dict(ceilings=best)))
    machine = dict(gpu=gpu, cpu="CPU", threads=2, note="Nothing else ran.")
    path.write_text(json.dumps(dict(
        machine_info=dict(dalle2_fast=machine), datetime="2026-01-02T03:04", benchmarks=rows,
        commit_info=dict(id="0123456789abcdef", dirty=False),
        dalle2_fast_absent=[Row(*key, absent=why).to_json() for key, why in absent])))  # fmt: skip
    return path


def test_the_report_says_where_we_win_and_lose(tmp_path, capsys):
    """Catches: an inverted ratio, a goal wrongly reported as met, an older run that hides a newer one, and an
    absent rival that is dropped."""
    pytest.importorskip("matplotlib", reason='matplotlib is not installed: pip install -e ".[bench]"')
    absent = [(("loss", "rival"), "not installed"), (("norm", "apex"), "not installed")]
    seconds = {("norm", "ours"): 9e-5, ("norm", "eager"): 9e-5}
    first = run_file(tmp_path / "1.json", seconds, absent=absent)
    second = run_file(tmp_path / "2.json", {("norm", "eager"): 1.35e-4, ("loss", "ours"): 3e-4,
                                            ("loss", "rival"): 7.5e-5})  # fmt: skip
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    command = [str(first), str(second), "--output", str(folder), "--summary", str(readme)]
    assert report.main(command) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    endings = (".json", ".md", "-rivals.png", "-roofline.png")
    assert [path.name for path in written] == [*(f"gpu-1{ending}" for ending in endings), "README.md"]
    assert all(path.stat().st_size > 500 for path in written[:-1])
    result = json.loads(written[0].read_text())
    rows = {(row["case"], row["implementation"]): row for row in result["rows"]}
    assert rows["norm", "eager"]["ours_is_faster"] == pytest.approx(3.0)
    assert rows["loss", "rival"]["ours_is_faster"] == pytest.approx(0.5)
    assert rows["norm", "eager"]["goals"] == [["2x", True]] and rows["norm", "ours"]["goals"][0][1]
    assert rows["loss", "ours"]["goals"] == [["100 us", False]] and rows["loss", "rival"]["goals"] == []
    assert result["absent"] == [dict(case="norm", implementation="apex", why="not installed")]
    text = written[1].read_text()
    assert "| norm | eager | 135.0 | 5% | 1 | 2000 |  | 40% | 1 | 3.00x | 2x yes |" in text
    assert "| loss | **ours** | 300.0 | 5% | 1 | 2000 |  | 40% | 1 |  | 100 us **no** |" in text
    assert "- not installed: norm / apex" in text
    shown = readme.read_text()
    assert shown.startswith("above\n") and shown.endswith("\nbelow\n") and "old" not in shown
    assert "| norm | 0.09 |  | eager 3.00 |" in shown and "Nothing else ran." in shown
    assert "[rivals](results/gpu-1-rivals.png)" in shown
    once = shown
    assert report.main(command) == 0 and readme.read_text() == once
    readme.write_text("no markers")
    with pytest.raises(SystemExit):
        report.main(command)
    assert "expected the markers" in capsys.readouterr().err and readme.read_text() == "no markers"


def test_the_regression_check_sees_a_slower_row(tmp_path, capsys):
    """Catches: noise reported as a regression; a regression or a lost row that is not reported."""
    results = []
    for index, seconds in enumerate((1e-4, 1.09e-4, 1.2e-4)):
        folder = tmp_path / str(index)
        run = run_file(tmp_path / f"{index}.json", {("norm", "ours"): seconds, ("b", "ours"): 1e-4})
        assert report.main([str(run), "--output", str(folder), "--no-plots"]) == 0
        results.append(str(folder / "gpu-1.json"))
    assert report.main(["--compare", results[0], results[1]]) == 0
    assert report.main(["--compare", results[0], results[2]]) == 1
    assert "norm / ours: 1.20x as long (spread allows 1.10x)" in capsys.readouterr().out
    lost = json.loads(Path(results[0]).read_text())
    lost["rows"].pop()
    Path(results[1]).write_text(json.dumps(lost))
    assert report.main(["--compare", results[0], results[1]]) == 1


def test_rows_short_of_a_goal_are_those_to_profile(tmp_path):
    """Catches a row that missed its goal and is not profiled, from the file of a run or of a result."""
    from benchmarks.timing.profile_rows import short_of_a_goal

    seconds = {("met", "ours"): 9e-5, ("late", "ours"): 3e-4, ("beaten", "ours"): 9e-5}
    seconds["beaten", "eager"] = 8e-5
    run = run_file(tmp_path / "run.json", seconds)
    assert short_of_a_goal(run) == ["late", "beaten"]
    assert report.main([str(run), "--output", str(tmp_path), "--no-plots"]) == 0
    assert short_of_a_goal(tmp_path / "gpu-1.json") == ["late", "beaten"]


def test_memory_and_time_of_the_loss_are_drawn(tmp_path):
    """Catches a curve without the sizes that only our loss can run."""
    pytest.importorskip("matplotlib", reason='matplotlib is not installed: pip install -e ".[bench]"')
    from benchmarks.timing.plots import plot_memory

    point = dict(cpu_s=1.0, extra_MB=10.0)
    shared = dict(loss="contrastive_loss", threads=2, D=512, fused=point)
    rows = [dict(shared, N=4096, open_clip=point), dict(shared, N=131072)]
    path = tmp_path / "contrastive_memory.json"
    assert plot_memory(path) == []
    path.write_text(json.dumps(dict(machine=dict(cpu="CPU"), rows=rows)))
    assert [one.name for one in plot_memory(path)] == ["contrastive_memory.png"]


@pytest.mark.parametrize("content, says", [("{}", "expected a file of pytest benchmarks/"), ("", "JSON")])
def test_the_report_names_a_wrong_file(content, says, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        report.main([str(path)])
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_runs_of_two_devices_are_not_mixed(tmp_path, capsys):
    runs = [run_file(tmp_path / f"{gpu}.json", {("a", "ours"): 1.0}, gpu) for gpu in ("A", "B")]
    with pytest.raises(SystemExit):
        report.main([str(path) for path in runs])
    assert "expected a run on A, got one on B" in capsys.readouterr().err
