"""Random numbers for some rows of a batch: exactly those that these rows have in the whole batch.

A process of many, or a micro-batch, computes some rows of the batch of a training step. Its generator has the
seed of the step, draws the numbers of the whole batch and takes its rows. The number of processes and of
micro-batches therefore changes no noise, no time and no dropped condition. The draws cost little: they are
the elements of the batch once, where a network reads each of them thousands of times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class BatchGenerator(torch.Generator):
    """A torch.Generator for one of several equal parts of a batch, see `draw`.

    Attributes:
        part: number of the part, 0 <= part < parts.
        parts: number of parts of the batch.

    Example:
        >>> generator = BatchGenerator()
        >>> whole = draw(torch.rand, (4,), generator.manual_seed(0))
        >>> generator.part, generator.parts = 1, 2
        >>> torch.equal(draw(torch.rand, (2,), generator.manual_seed(0)), whole[2:])
        True
    """

    part: int = 0
    parts: int = 1
    rows: tuple[int, int] | None = None  # set by `batch_rows_are`


def batch_rows(rows: int, generator: torch.Generator | None) -> tuple[int, int]:
    """The number of the first of these rows in the whole batch, and the number of rows of that batch.

    Args:
        rows: how many rows there are here.
        generator: of their random numbers; only a `BatchGenerator` can belong to a part of a batch.
    """
    if not isinstance(generator, BatchGenerator):
        return 0, rows
    return generator.rows or (generator.part * rows, generator.parts * rows)


@contextmanager
def batch_rows_are(first: int, total: int, generator: torch.Generator | None) -> Iterator[None]:
    """Within the block the rows of `generator` are those from `first` of a batch of `total` rows."""
    if not isinstance(generator, BatchGenerator):
        yield
        return
    before, generator.rows = generator.rows, (first, total)
    try:
        yield
    finally:
        generator.rows = before


def draw(
    function: Callable[..., Tensor], shape: Sequence[int], generator: torch.Generator | None, **options
) -> Tensor:
    """function(shape, generator=generator, **options): random numbers of the rows of a batch.

    Args:
        function: torch.rand, torch.randn, or torch.randint with its range filled in.
        shape: of the result; shape[0] is the number of rows here.
        generator: a `BatchGenerator` draws the numbers of the whole batch and returns those of its rows.
        options: of the function.

    Example:
        >>> draw(torch.randn, (2, 3), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    first, total = batch_rows(shape[0], generator)
    if total == shape[0]:
        return function(tuple(shape), generator=generator, **options)
    return function((total, *shape[1:]), generator=generator, **options)[first : first + shape[0]]
