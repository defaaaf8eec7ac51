"""The check before timing: an implementation must agree with the reference in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases.registry import Case, Inputs
from tests.support.truth import assert_close_to_truth

RIVAL_ERROR = 0.05  # relative; a rival has to compute the same formula, it need not be as accurate as ours


def ours(case: Case, impl: str) -> Callable:
    """Our implementation of a case as a function of its inputs, like a rival."""
    return lambda **inputs: case.ours(impl, **inputs)


def check(case: Case, name: str, function: Callable, inputs: Inputs) -> None:
    """Raise AssertionError if an implementation disagrees with the reference in float64, or if ours does not
    give the same bits twice."""
    if hasattr(function, "ready"):
        function.ready(inputs)  # copies the weights, before the float64 copy of the network is made
    inputs64 = {key: in_float64(value) for key, value in inputs.items()}
    actual = results_of(case, function, inputs)
    if name in case.unshared_weights:
        check_form(name, actual, results_of(case, ours(case, "reference"), inputs))
        return
    truth = results_of(case, ours(case, "reference"), inputs64)
    plain = results_of(case, ours(case, "reference"), inputs)
    if not name.startswith("ours"):
        check_formula(case, name, actual, plain, truth)
        return
    plain, truth = ({key: one[key] for key in actual} for one in (plain, truth))  # without what is foreign
    assert_close_to_truth(actual, plain, truth, slack=case.slack)
    again = results_of(case, function, inputs) if case.same_bits else actual
    for key in actual:
        assert torch.equal(actual[key], again[key]), f"{key}: other bits the second time"


def check_form(name: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """A rival with other weights: as many outputs as ours, and all of them finite."""
    for key, value in expected.items():
        if not key.startswith("output"):
            continue
        assert actual[key].numel() == value.numel(), f"{name}: {key} has another size"
        assert bool(actual[key].isfinite().all()), f"{name}: {key} is not finite"


def check_formula(
    case: Case, name: str, actual: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """A rival with the same weights: near enough to the truth to be the same formula."""
    skipped = [] if case.checked_outputs is None else [
        key for key in truth if key.startswith("output") and int(key.split()[1]) not in case.checked_outputs
    ]  # fmt: skip
    for key in actual.keys() - skipped:
        norm = truth[key].norm()
        error, plain_error = ((one[key].double() - truth[key]).norm() / norm for one in (actual, plain))
        # In bfloat16 any implementation of a deep network's gradient may be off by more.
        limit = max(RIVAL_ERROR, 2 * plain_error)
        assert error < limit, f"{name}: {key} is off by {error:.1%}: not the same formula"


def results_of(case: Case, function: Callable, inputs: Inputs) -> dict[str, Tensor]:
    """{"output 0": ..., "d x": ...}: outputs and gradients. The gradient of a network is one long vector."""
    inputs, grad = prepare(case, inputs)
    foreign = hasattr(function, "leaves")  # a rival network: the order of its parameters is not that of ours
    with torch.set_grad_enabled(bool(case.backward)):
        outputs = function(**inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    leaves = {} if foreign else {name: leaves_of(inputs[name]) for name in case.backward}
    if leaves:
        flat = [leaf for some in leaves.values() for leaf in some]
        gradients = iter(torch.autograd.grad(outputs[0], flat, grad, allow_unused=True))
        for name, some in leaves.items():
            parts = [part for part in (next(gradients) for _ in some) if part is not None]
            network = isinstance(inputs[name], nn.Module)
            results[f"d {name}"] = torch.cat([part.flatten() for part in parts]) if network else parts[0]
    return results


def prepare(case: Case, inputs: Inputs) -> tuple[dict, Tensor | None]:
    """The inputs of a call, those in case.backward as leaves, and the gradient of the output."""
    inputs = dict(inputs)
    grad = inputs.pop("grad", None)
    for name in case.backward:
        if isinstance(inputs[name], Tensor):
            inputs[name] = inputs[name].detach().requires_grad_()
    return inputs, grad


def leaves_of(value: Tensor | nn.Module) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value.parameters())


def in_float64(value: object) -> object:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
