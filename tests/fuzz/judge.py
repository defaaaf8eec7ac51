"""Run a drawn call and say what is wrong with its values and gradients, or with the error it raises."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.ops import _native
from tests.fuzz.calls import Call, draw
from tests.support import interpreter_bf16

LOSSES = ("contrastive_loss", "soft_contrastive_loss", "sigmoid_loss")


def judge(number: int) -> tuple[str, str, str | None]:
    """(op, "valid" or "invalid", what is wrong or None) of one call."""
    call = draw(number)
    if call.wrong is not None:
        return call.op, "invalid", judge_wrong(call)
    try:
        return call.op, "valid", judge_right(call)
    except Exception as error:  # an error is an outcome of what is tested
        return call.op, "valid", f"{type(error).__name__}: {str(error)[:300]}"


def implementations(call: Call) -> list[str]:
    """The forms of an op that run here: "fused" in Triton's interpreter, or in the native module."""
    if call.op == "sample_noise":
        return []  # it takes no impl; the kernel's own tests compare bits
    if call.op in LOSSES and _native.WHY_ABSENT is not None:
        return ["reference"]
    floats = [v for v in call.arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    if call.op not in LOSSES and any(value.dtype == torch.float64 for value in floats):
        return ["reference"]
    return ["reference", "fused"]


def judge_right(call: Call) -> str | None:
    interpreter_bf16.mend()
    function = getattr(functional, call.op)
    if call.op == "sample_noise":
        noise = function(**call.arguments)
        right = noise.dtype == call.arguments["dtype"] and bool(noise.isfinite().all())
        return None if right else "another dtype, or not finite"
    backward = call.op != "diffusion_step"
    truth = outcome(call, "reference", torch.float64, backward)
    plain = outcome(call, "reference", None, backward)
    for impl in implementations(call):
        actual = outcome(call, impl, None, backward)
        missing = truth.keys() ^ actual.keys()
        if missing:
            return f"{impl}: only one of the two has {', '.join(sorted(missing))}"
        for key, value in actual.items():
            if value.dtype != plain[key].dtype:
                return f"{impl}: {key} is {value.dtype}, the reference's {plain[key].dtype}"
            fault = difference(value, plain[key], truth[key], magnitude(call))
            if fault is not None:
                return f"{impl}: {key} {fault}"
    return None


def magnitude(call: Call) -> float:
    """The largest number that an op sums: such numbers may cancel, but their rounding stays.

    In the gradients of attention they are products of k, v and the gradient of the output, in those of a loss
    the square of logit_scale; in other ops they are as large as the inputs. The norm divides by a standard
    deviation, which may be 0.
    """
    numbers = [abs(value) for value in call.arguments.values() if isinstance(value, float)]
    tensors = [v for v in call.arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    largest = max([1.0, *numbers, *(value.abs().max().item() for value in tensors if value.numel())])
    if call.op == "group_norm_silu" and call.arguments["x"][:1].numel() == call.arguments["num_groups"]:
        return largest * call.arguments["eps"] ** -0.5  # one value per group: its variance is 0
    return largest ** (3 if call.op == "cross_attention" else 2 if call.op in LOSSES else 1)


def difference(actual: Tensor, plain: Tensor, truth: Tensor, magnitude: float) -> str | None:
    """How far `actual` is from the truth, if that is more than 3 times what `plain` is.

    The comparison of the other tests (tests/support/truth.py) with one more allowance: where the truth is
    0 by cancellation, the error of `plain` may be 0 by chance.
    """
    if actual.shape != truth.shape:
        return f"has the shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if actual.numel() == 0:
        return None
    rounding = torch.finfo(actual.dtype).eps
    actual, plain = actual.double(), plain.double()
    finite = plain.isfinite()  # low precision may overflow, with every backend
    if not bool(actual[finite].isfinite().all()):
        return "is not finite where the reference is"
    actual, plain, truth = actual[finite], plain[finite], truth[finite]
    if actual.numel() == 0:
        return None
    cancelled = 64 * rounding * magnitude
    error, plain_error, size = ((value).norm().item() for value in (actual - truth, plain - truth, truth))
    limit = 3 * plain_error + 1e-5 * size + cancelled * math.sqrt(truth.numel())
    if error > limit:
        return f"is off by {error:.3e} > {limit:.3e} (plain: {plain_error:.3e}, size {size:.3e})"
    worst, largest = (actual - truth).abs().max().item(), truth.abs().max().item()
    limit = 4 * (plain - truth).abs().max().item() + (rounding + 1e-5) * largest + cancelled
    if worst > limit:
        return f"has one element off by {worst:.3e} > {limit:.3e} (largest {largest:.3e})"
    return None


def outcome(call: Call, impl: str, dtype: torch.dtype | None, backward: bool) -> dict[str, Tensor]:
    """Outputs and gradients of a call, floating tensors cast to dtype."""
    arguments, leaves = dict(call.arguments), {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            if dtype is not None:
                value = value.to(dtype)
            if backward and name in call.differentiable:
                value = leaves[name] = value.detach().requires_grad_()
            arguments[name] = value
    with torch.set_grad_enabled(backward):
        outputs = getattr(functional, call.op)(**arguments, impl=impl)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = {f"output {index}": value.detach() for index, value in enumerate(outputs)}
    if backward and leaves:
        generator = torch.Generator().manual_seed(call.number)
        weight = torch.randn(outputs[0].shape, generator=generator).bfloat16().to(outputs[0])
        gradients = torch.autograd.grad(outputs[0], list(leaves.values()), weight, allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            found[f"d {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def judge_wrong(call: Call) -> str | None:
    """None if the error is a ValueError or TypeError that begins with the name of an argument of the op."""
    name, how = call.wrong
    function = getattr(functional, call.op)
    known = tuple(inspect.signature(function).parameters)
    try:
        function(**call.arguments)
    except (TypeError, ValueError) as error:
        first = str(error).partition(":")[0]
        named = [part.strip() for part in first.split(",")]
        if ":" in str(error) and all(part in known for part in named):
            return None
        return f"{name} {how}: {type(error).__name__} without an argument's name: {str(error)[:200]}"
    except Exception as error:
        return f"{name} {how}: {type(error).__name__}: {str(error)[:200]}"
    return f"{name} {how}: accepted"


def summary(outcomes: Mapping[int, tuple[str, str, str | None]]) -> dict[str, dict[str, int]]:
    """op -> counts of valid and invalid calls, and of faults."""
    table: dict[str, dict[str, int]] = {}
    for op, kind, fault in outcomes.values():
        row = table.setdefault(op, {"valid": 0, "invalid": 0, "faults": 0})
        row[kind] += 1
        row["faults"] += fault is not None
    return dict(sorted(table.items()))
