"""The implementation of all ops of a network at once: "auto", "reference" or "fused"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def implementation(network: nn.Module, impl: str) -> Iterator[None]:
    """Within the block every op of `network` runs as `impl` says; afterwards each runs as before.

    Exporters need "reference": they translate torch's operations and cannot read a kernel.

    Args:
        network: any network of this package.
        impl: "auto", "reference" or "fused", see `functional`.

    Example:
        >>> from dalle2_fast.modules import GroupNormSiLU
        >>> norm = GroupNormSiLU(num_groups=1, num_channels=2)
        >>> with implementation(norm, "reference"):
        ...     norm.impl
        'reference'
        >>> norm.impl
        'auto'
    """
    ops = [module for module in network.modules() if hasattr(module, "impl")]
    before = [op.impl for op in ops]
    for op in ops:
        op.impl = impl
    try:
        yield
    finally:
        for op, choice in zip(ops, before, strict=True):
            op.impl = choice
