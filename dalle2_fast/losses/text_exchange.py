"""How the text features of every process reach every other process, and their gradients come back.

A block is the texts of one process [n, D], its owner. With "gather" there is one block [N, D] with the texts
of all processes, whose owner is EVERYONE.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dalle2_fast.losses.collectives import gather, reduce_scatter

EVERYONE = -1


def text_blocks(text: Tensor, exchange: str) -> Iterator[tuple[int, Tensor]]:
    """(owner, block) for the texts of all processes, each once."""
    rank, world = dist.get_rank(), dist.get_world_size()
    text = text.contiguous()
    if exchange == "gather":
        yield EVERYONE, gather(text)
    elif exchange == "reduce":
        for owner in range(world):
            block = text if owner == rank else torch.empty_like(text)
            dist.broadcast(block, src=owner)
            yield owner, block
    else:
        rightward, leftward = _hops(exchange)
        from_right = _ring(text, -1, leftward)
        next(from_right)  # the local block, which the other direction yields, too
        for blocks in itertools.zip_longest(_ring(text, 1, rightward), from_right):
            yield from filter(None, blocks)


def return_gradients(blocks: dict[int, Tensor], exchange: str) -> Tensor:
    """{owner: gradient of its texts, computed here} -> gradient of the local texts, summed over processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if exchange == "gather":
        return reduce_scatter(blocks[EVERYONE])
    if exchange == "reduce":
        for owner, block in sorted(blocks.items()):
            dist.reduce(block, dst=owner)
        return blocks[rank]
    total = blocks[rank]
    for step, hops in zip((1, -1), _hops(exchange), strict=True):
        # The block of the farthest owner is sent first; on its way back each process adds its gradient.
        received = None
        for hop in range(hops, 0, -1):
            block = blocks[(rank - step * hop) % world]
            received = _pass_on(block if received is None else received + block, -step)()
        total = total if received is None else total + received
    return total


def _hops(exchange: str) -> tuple[int, int]:
    """How far a block travels rightward (to higher ranks) and leftward."""
    others = dist.get_world_size() - 1
    return (others, 0) if exchange == "shift" else (others - others // 2, others // 2)


def _ring(text: Tensor, step: int, hops: int) -> Iterator[tuple[int, Tensor]]:
    """The local block and those of the `hops` processes behind. The next travels while one is processed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for hop in range(hops + 1):
        wait = _pass_on(text, step) if hop < hops else None
        yield (rank - step * hop) % world, text
        text = text if wait is None else wait()


def _pass_on(block: Tensor, step: int) -> Callable[[], Tensor]:
    """Send to the neighbour `step` away and receive from the one behind; the result waits for this."""
    rank, world = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(block)
    requests = dist.batch_isend_irecv([
        dist.P2POp(dist.isend, block, (rank + step) % world),
        dist.P2POp(dist.irecv, received, (rank - step) % world),
    ])  # fmt: skip

    def wait() -> Tensor:
        for request in requests:
            request.wait()
        return received

    return wait
