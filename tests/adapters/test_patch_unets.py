"""Patched U-Nets of other packages against unpatched ones: outputs and every gradient.

Each test names the fault it would catch. The patched U-Net is compared with the unpatched one at the same
dtype; the truth is the unpatched one in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.cases import foreign_unets
from dalle2_fast.adapters._swap import Patched
from dalle2_fast.adapters.patch import patch, unpatch


def small(name: str, **changes) -> tuple[nn.Module, dict]:
    """A small U-Net in which every weight has an effect, and inputs: bfloat16 numbers in float32."""
    pytest.importorskip(foreign_unets.package(name), reason=f"{foreign_unets.package(name)} is not installed")
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    net = foreign_unets.build(name, small=True, **changes).train()
    for module in net.modules():
        if hasattr(module, "fp16_eps"):  # DALLE2-pytorch's LayerNorm: the same eps for all dtypes
            module.eps = module.fp16_eps
    with torch.no_grad():
        for value in net.parameters():
            if float(value.detach().abs().max()) in (0.0, 1.0):  # as initialised: zero layers, norms
                value += 0.2 * torch.randn(value.shape, generator=generator)
            value.copy_(value.bfloat16())
    return net, rounded(foreign_unets.inputs(name, net, 2, generator))


def rounded(given):
    if isinstance(given, dict):
        return {key: rounded(value) for key, value in given.items()}
    return given.bfloat16().float() if is_floating(given) else given


def cast(given, dtype):
    if isinstance(given, dict):
        return {key: cast(value, dtype) for key, value in given.items()}
    return given.to(dtype) if is_floating(given) else given


def is_floating(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def results(net: nn.Module, given: dict) -> dict[str, torch.Tensor]:
    """The output and the gradients of all parameters that get one."""
    net.zero_grad()
    out = foreign_unets.run(net, cast(given, next(net.parameters()).dtype))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    out.backward(weight.to(out.dtype))
    grads = {key: value.grad for key, value in net.named_parameters() if value.grad is not None}
    assert len(grads) > 50
    return {"output": out.detach(), **grads}


@pytest.mark.parametrize("name", foreign_unets.NAMES)
def test_float32_agrees(name):
    """Catches: a changed block, mask, scale, FiLM or skip; weights without a gradient."""
    net, given = small(name)
    plain = results(net, given)
    report = patch(net)
    assert not report.skipped, str(report)
    ours = results(net, given)
    assert ours.keys() == plain.keys()
    largest = max(value.norm() for value in plain.values())
    for key, value in plain.items():
        error = (ours[key] - value).norm()
        # The gradient of a bias of keys is almost zero: it consists of rounding errors of larger gradients.
        assert error <= 1e-5 * value.norm() + 1e-8 * largest, f"{key}: {error / value.norm():.1e}"
    assert unpatch(net) == len(report.swapped)
    again = results(net, given)
    assert all(torch.equal(again[key], value) for key, value in plain.items())


@pytest.mark.parametrize("name", foreign_unets.NAMES)
def test_bfloat16_is_as_near_to_the_truth(name):
    """Catches: a result that is rounded more often than without the patch.

    After dozens of rounded layers a single error is random, and for a few weights it may be small by chance.
    So the factor of 1.5 applies to the root mean square over several inputs.
    """
    net, _ = small(name)
    plain = copy.deepcopy(net).bfloat16()
    ours = copy.deepcopy(plain)
    patch(ours)
    net.double()
    squares: dict[str, list[float]] = {}
    for seed in range(16):
        given = rounded(foreign_unets.inputs(name, net, 1, torch.Generator().manual_seed(100 + seed)))
        truth = results(net, given)
        for place, patched in enumerate((plain, ours)):
            for key, value in results(patched, given).items():
                error = (value.double() - truth[key]).norm().item()
                squares.setdefault(key, [0.0, 0.0])[place] += error**2
    assert len(squares) > 50
    for key, (theirs, mine) in squares.items():
        assert mine <= 1.5**2 * theirs, f"{key}: squares of errors {mine:.2e}, as it was {theirs:.2e}"


@pytest.mark.parametrize("name", foreign_unets.NAMES)
def test_the_benchmark_compares_the_same_networks(name, monkeypatch):
    """Catches: rows that time two networks with different weights, or two patched ones."""
    pytest.importorskip(foreign_unets.package(name), reason=f"{foreign_unets.package(name)} is not installed")
    from benchmarks.cases import registry
    from benchmarks.timing.agreement import check, ours

    registry.load()
    rows = [case for case in registry.CASES.values() if case.name.startswith(f"patched {name},")]
    assert len(rows) == 2 and [bool(case.backward) for case in rows] == [False, True]
    for case in rows:
        inputs = case.make("cpu", torch.float32, True)
        check(case, "ours", ours(case, "reference"), inputs)
        check(case, "unpatched", case.rivals["unpatched"], inputs)
        theirs = case.rivals["unpatched"].ready(inputs)
        assert not any(isinstance(module, Patched) for module in theirs.modules())
        assert any(isinstance(module, Patched) for module in inputs["net"].modules())
    assert rows[0].bytes() > 10**8


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are recorded in Triton's interpreter")
def test_the_count_of_launches(kernel_device, monkeypatch):
    """Catches: views or metadata counted as launches; kernels of ours that are not counted, or twice."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.timing import launches_patched

    with FakeTensorMode() as fake:
        net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(32, 64), nn.SiLU(), nn.Flatten())
        x = torch.empty(2, 3, 16, 16)
    before = launches_patched.count(lambda: net(x), fake)
    patch(net)
    assert launches_patched._dispatch.load_kernels(torch.device(kernel_device)) is None
    monkeypatch.setattr(launches_patched._dispatch, "use_reference", lambda *_, **__: False)
    after = launches_patched.count(lambda: net(x), fake)
    assert before == dict(launches=3, of_ours={}, counted_once_each={"native_group_norm": 1})
    assert after == dict(launches=2, of_ours={"_resident_kernel": 1}, counted_once_each={})
