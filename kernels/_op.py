"""Registration of the project's ops: the only caller of torch.library.

An op is defined once, with an explicit schema, and runs on every device (`CompositeExplicitAutograd`), so
that the same op can also run on the CPU through Triton's interpreter. Ops are functional: what the backward
pass needs is an output, never a mutated input. The low-level registration is the fast one: 2-3 us per call
in inference mode against about 10 for `torch.library.custom_op` and 11 for `triton_op` (one CPU host).

    op = define("square(Tensor x) -> Tensor", run=lambda x: x * x, fake=torch.empty_like)
    differentiate(op, save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
                  backward=lambda ctx, grad: 2 * grad * ctx.saved_tensors[0])
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "dalle2_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, *, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Register one op and return it; it is then also `torch.ops.dalle2_fast.<name>`.

    schema: "name(Tensor x, float scale) -> Tensor", without the namespace.
    run:    computes the outputs as new tensors. It sees no autograd; `differentiate` adds the gradient.
    fake:   same arguments; returns empty outputs of the right shape, dtype and strides without computing
            (for torch.compile and the meta device).
    """
    name = _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.dalle2_fast, name).default


def differentiate(op: torch._ops.OpOverload, *, save: Callable, backward: Callable) -> None:
    """Give an op its gradient.

    save:     (ctx, inputs, output) keeps what the gradient needs, with ctx.save_for_backward for tensors.
    backward: (ctx, *grads of the outputs) -> one gradient or None per input. It must itself be made of ops,
              or torch.compile cannot trace it.
    """
    torch.library.register_autograd(op._schema.name, backward, setup_context=save, lib=_library)
