"""Keys and values of the context, projected once for all steps of a sampling run.

    with context_cache():
        for t in scheduler.timesteps: unet(x, t, encoder_hidden_states=context)

In such a run every step asks the same projections for the same context. Kept is one pair of keys and values
for each attention. It is used again only for the same tensor object, unchanged (by its version counter),
under the same weights (the same objects, storage and version) and autocast; otherwise it is projected anew.
Nothing is kept for a projection that is more than an `nn.Linear` (LoRA, hooks), while gradients are on, in
training mode, for tensors of inference mode (they have no version) or in a compiled graph, nor after the
block. What a version counter cannot see is a write through `.data`: do not do that within the block.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_store: ContextVar[dict[nn.Module, _Entry] | None] = ContextVar("dalle2_fast_context_cache", default=None)


@contextlib.contextmanager
def context_cache() -> Iterator[None]:
    """Attention that is patched, or has a processor of `adapters.diffusers`, keeps its context within."""
    token = _store.set({})
    try:
        yield
    finally:
        _store.reset(token)


class _Entry:
    """What was projected, and from what."""

    def __init__(self, context: Tensor, linears: tuple[nn.Linear, ...], results: tuple[Tensor, ...]) -> None:
        self.results, self.stamp = results, _stamp(context, linears)
        self.objects = [weakref.ref(tensor) for tensor in (context, *_weights(linears))]

    def fits(self, context: Tensor, linears: tuple[nn.Linear, ...]) -> bool:
        objects = (context, *_weights(linears))
        same = len(objects) == len(self.objects) and all(
            seen() is now for seen, now in zip(self.objects, objects, strict=True)
        )
        return same and self.stamp == _stamp(context, linears)


def _weights(linears: tuple[nn.Linear, ...]) -> list[Tensor]:
    return [one for linear in linears for one in (linear.weight, linear.bias) if one is not None]


def _stamp(context: Tensor, linears: tuple[nn.Linear, ...]) -> tuple:
    device = context.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return autocast, *((one.data_ptr(), one._version) for one in (context, *_weights(linears)))


def _keeps(linear: nn.Module) -> bool:
    bare = type(linear).forward is nn.Linear.forward and "forward" not in vars(linear)
    return bare and not (linear._forward_hooks or linear._forward_pre_hooks or linear.weight.is_inference())


def project(owner: nn.Module, context: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Each of `linears` on the context; in a `context_cache`, what it was the last time if it still is."""
    store = None if torch.compiler.is_compiling() else _store.get()
    if (
        store is None
        or owner.training
        or torch.is_grad_enabled()
        or context.is_inference()
        or not all(map(_keeps, linears))
    ):
        return tuple(linear(context) for linear in linears)
    entry = store.get(owner)
    if entry is None or not entry.fits(context, linears):
        entry = store[owner] = _Entry(context, linears, tuple(linear(context) for linear in linears))
    return entry.results
