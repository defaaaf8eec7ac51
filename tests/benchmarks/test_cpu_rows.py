"""The rows of a CPU at tiny sizes: ours and every rival compute the same, with the same weights."""

from __future__ import annotations

import pytest

from benchmarks.cases import cpu, registry
from benchmarks.cases.sizes import parameter_count
from benchmarks.timing.agreement import check, ours
from dalle2_fast import DALLE2

CASES = {name: case for name, case in registry.load().items() if name.endswith((", fp32)", ", bf16)"))}
NETWORKS = [name for name in CASES if "of the package" in name]
JOBS = [name for name in CASES if "with the package" in name]


@pytest.mark.parametrize("name", [name for name in CASES if name not in JOBS])
def test_ours_and_rivals_agree_with_the_truth(name):
    """Catches a rival with other weights, options or inputs, and a row whose reference is not the op's."""
    case = CASES[name]
    inputs = case.make("cpu", None, True)
    check(case, "ours", ours(case, "fused"), inputs)
    for kind, rival in case.rivals.items():
        if callable(rival) and not getattr(rival, "compiles", False):
            check(case, kind, rival, inputs)


@pytest.mark.parametrize("package, kind", [("openvino", "openvino"), ("onnxruntime", "onnxruntime")])
@pytest.mark.parametrize("part", ["decoder of", "upsampler of"])
def test_networks_in_other_runtimes_agree_with_the_truth(part, package, kind):
    """Catches inputs that reach another runtime in another order or dtype."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    case = next(CASES[name] for name in NETWORKS if name.startswith(part) and name.endswith("fp32)"))
    check(case, kind, case.rivals[kind], case.make("cpu", None, True))


def test_the_networks_are_those_of_the_package():
    """Catches rows of sizes that the checkpoint in the package no longer has."""
    pipe = DALLE2.from_pretrained(device="cpu")
    for name in cpu.CONFIGS:
        assert cpu.built(name, "meta", None).config == getattr(pipe, name).unet.config
        assert cpu.parameters(name) == parameter_count(getattr(pipe, name).unet)


def test_each_dtype_has_its_rows():
    """Catches a row that is timed in one dtype alone without a reason."""
    alone = {name.rsplit(" (CPU", 1)[0] for name in CASES}
    for name in alone:
        pair = {f"{name} (CPU, {dtype})" in CASES for dtype in cpu.DTYPES}
        assert pair == {True} or "conv3x3" in name or "training step" in name


@pytest.mark.parametrize("name", JOBS)
def test_the_job_is_that_of_the_command_line(name):
    """Catches a job of fewer images or steps than the command line's."""
    made = CASES[name].make("cpu", None, False)
    assert made["images"] == 4 and made["settings"] == {} and made["pipe"].sampling["steps"] == 12
