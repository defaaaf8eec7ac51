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


def differentiate(op: torch._ops.OpOverload, *, save: Callable, backward: Callable) -> None:
    """Give an op its gradient.

    save:     (ctx, inputs, output) saves what the gradient needs; tensors with ctx.save_for_backward.
    backward: (ctx, *grads of the outputs) -> one gradient or None per input. It must consist of ops, because
              torch.compile traces it.
    """
    torch.library.register_autograd(op._schema.name, backward, setup_context=save, lib=_library)
