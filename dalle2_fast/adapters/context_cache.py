"""Keys and values of the context, projected once for all steps of a sampling run.

Without a cache, every step applies the same projections to the same context. The cache holds one pair of keys
and values per attention module. It reuses them only for the same tensor object, unchanged (by its version
counter), under the same weights (the same objects, storage and version) and autocast; otherwise it projects
again. Nothing is cached for a projection that is more than an `nn.Linear` (LoRA, hooks), while gradients are
enabled, in training mode, for tensors of inference mode (which have no version), in a compiled graph, or
after the block.
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
    """Within the block, attention modules project their context once, as long as it stays the same.

    It applies, in this thread, to attention that `dalle2_fast.patch` has patched or that has a processor of
    `dalle2_fast.adapters.diffusers`. A nested block begins with an empty cache. Do not write through `.data`
    within the block: a version counter does not see it.

    Example:
        >>> import torch
        >>> from dalle2_fast.adapters.context_cache import project
        >>> to_k, context = torch.nn.Linear(4, 4).eval(), torch.ones(1, 2, 4)
        >>> with torch.no_grad(), context_cache():
        ...     first, second = (project(to_k, context, to_k)[0] for _ in range(2))
        >>> second is first
        True
    """
    token = _store.set({})
    try:
        yield
    finally:
        _store.reset(token)


class _Entry:
    """Projections, and what they were computed from."""

    def __init__(self, context: Tensor, linears: tuple[nn.Linear, ...], results: tuple[Tensor, ...]) -> None:
        self.results, self.stamp = results, _stamp(context, linears)
        self.objects = [weakref.ref(tensor) for tensor in (context, *_weights(linears))]

    def is_valid(self, context: Tensor, linears: tuple[nn.Linear, ...]) -> bool:
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


def _is_cacheable(linear: nn.Module) -> bool:
    bare = type(linear).forward is nn.Linear.forward and "forward" not in vars(linear)
    return bare and not (linear._forward_hooks or linear._forward_pre_hooks or linear.weight.is_inference())


def project(owner: nn.Module, context: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Each linear layer applied to the context; within a `context_cache`, the cached result if it is valid.

    owner: the attention module; the cache holds one entry per owner.
    """
    store = None if torch.compiler.is_compiling() else _store.get()
    if (
        store is None
        or owner.training
        or torch.is_grad_enabled()
        or context.is_inference()
        or not all(map(_is_cacheable, linears))
    ):
        return tuple(linear(context) for linear in linears)
    entry = store.get(owner)
    if entry is None or not entry.is_valid(context, linears):
        entry = store[owner] = _Entry(context, linears, tuple(linear(context) for linear in linears))
    return entry.results
