"""Registration of the project's ops: the only caller of torch.library.

An op is defined once, with an explicit schema. It may have two implementations: a Triton kernel, registered
for every device (`CompositeExplicitAutograd`), so that the same op also runs on the CPU in Triton's
interpreter, and a function of the native module for the CPU. Ops are functional: they mutate no input, and
what the backward pass needs is an output. The low-level registration takes 2-3 us per call in inference mode;
`torch.library.custom_op` takes about 10 and `triton_op` about 11 (one CPU host).

    op = define("square(Tensor x) -> Tensor", run=lambda x: x * x, fake=torch.empty_like)
    differentiate(op, save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
                  backward=lambda ctx, grad: 2 * grad * ctx.saved_tensors[0])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

NAMESPACE = "dalle2_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, *, fake: Callable, run: Callable | None = None) -> torch._ops.OpOverload:
    """Register an op, which is then also `torch.ops.dalle2_fast.<name>`, and return it.

    schema: "name(Tensor x, float scale) -> Tensor", without the namespace.
    fake:   takes the same arguments and returns empty outputs of the right shape, dtype and strides, for
            torch.compile and the meta device.
    run:    see `implement`; None where other modules implement the op.
    """
    name = _library.define(schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(torch.ops.dalle2_fast, name).default
    if run is not None:
        implement(op, run)
    return op


def implement(op: torch._ops.OpOverload, run: Callable) -> None:
    """Run an op by this function on every device.

    run: computes the outputs as new tensors, without autograd; `differentiate` adds the gradient.
    """
    _library.impl(op._schema.name.removeprefix(f"{NAMESPACE}::"), run, "CompositeExplicitAutograd")


native: dict[str, Callable] = {}  # the implementations of `implement_on_cpu` by the names of their ops
_native_library = torch.library.Library(NAMESPACE, "IMPL")


def implement_on_cpu(op: torch._ops.OpOverload, run: Callable) -> None:
    """Run an op by this function on tensors of the CPU, also where `implement` gave it another one."""
    name = op._schema.name.removeprefix(f"{NAMESPACE}::")
    native[name] = run
    _native_library.impl(name, run, "CPU")


forward_mode: dict[str, Callable] = {}  # the ops that `differentiate` gave a tangent, by their names


def differentiate(
    op: torch._ops.OpOverload, *, save: Callable, backward: Callable, tangent: Callable | None = None
) -> None:
    """Give an op its gradient and, where `tangent` is given, its forward-mode derivative.

    save:     (ctx, inputs, output) saves what the gradient needs, with ctx.save_for_backward, and what the
              tangent needs, with ctx.save_for_forward.
    backward: (ctx, *grads of the outputs) -> one gradient or None per input. It must consist of ops, because
              torch.compile traces it.
    tangent:  (ctx, *tangents of the inputs) -> one tangent or None per output. It must consist of ops.

    torch.library registers no forward-mode derivatives: the op itself would silently give tangents of 0. The
    entry of `forward_mode` is a function that runs the op and has both derivatives. It is for one level of
    forward mode; nothing differentiates its gradient or its tangent again.
    """
    torch.library.register_autograd(op._schema.name, backward, setup_context=save, lib=_library)
    if tangent is None:
        return
    name = op._schema.name.removeprefix(f"{NAMESPACE}::")

    def backward_outside_of_the_level(ctx, *grads):
        if any(map(_has_tangent, (*grads, *ctx.saved_tensors))):
            raise NotImplementedError(
                f"{name}: the kernel has no derivative of its gradient (forward over reverse mode); run the "
                'backward pass after the forward-mode level, or use impl="reference"'
            )
        return backward(ctx, *grads)

    rules = {
        "forward": staticmethod(op),
        "setup_context": staticmethod(save),
        "backward": staticmethod(backward_outside_of_the_level),
        "jvp": staticmethod(tangent),
    }
    forward_mode[name] = type(name, (torch.autograd.Function,), rules).apply


def _has_tangent(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(value).tangent is not None
