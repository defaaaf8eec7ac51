"""Seconds of collectives, by the bytes that enter a node over its fabric and a GPU over NVLink.

A ring over nodes uses the ports of all eight GPUs of a node (NCCL builds one ring for each), so that what a
node receives passes 8 x FABRIC; inside the node each GPU receives it over NVLink. The two are pipelined: the
slower one counts. Latency, congestion and the host are left out: the seconds are lower bounds.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.scale.machine import FABRIC, HOP, MFU, NODE, NVLINK, nodes
from benchmarks.scale.workload import Stage

GRADIENT = 4  # bytes: DDP and FSDP2 reduce the gradients of float32 weights in float32
WEIGHT = 2  # bytes: FSDP2 gathers weights in bfloat16 (MixedPrecisionPolicy(param_dtype=bfloat16))


def gather_seconds(total: float, world: int) -> float:
    """An all-gather of `total` bytes in all, or a reduce-scatter of as many."""
    inside = total * (min(world, NODE) - 1) / min(world, NODE) / NVLINK
    if world <= NODE:
        return inside
    across = total * (nodes(world) - 1) / nodes(world) / (NODE * FABRIC)
    return max(across, total * (world - 1) / world / NVLINK)


def gather_bytes(total: float, world: int) -> float:
    """Bytes that each GPU receives in it."""
    return total * (world - 1) / world


class Parallel(NamedTuple):
    """What a way to divide the training moves in each step.

    Args:
        moved: bytes that each GPU receives.
        forward: seconds of the collectives of the forward pass.
        backward: seconds of those of the backward pass.
    """

    moved: float
    forward: float
    backward: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


def ddp(parameters: float, world: int) -> Parallel:
    """An all-reduce of the gradients: a reduce-scatter and an all-gather."""
    total = GRADIENT * parameters
    return Parallel(2 * gather_bytes(total, world), 0.0, 2 * gather_seconds(total, world))


def fsdp(parameters: float, world: int) -> Parallel:
    """Two all-gathers of the weights (forward, backward) and a reduce-scatter of the gradients."""
    weights, gradients = WEIGHT * parameters, GRADIENT * parameters
    gather = gather_seconds(weights, world)
    return Parallel(
        2 * gather_bytes(weights, world) + gather_bytes(gradients, world),
        gather,
        gather + gather_seconds(gradients, world),
    )


def hsdp(parameters: float, world: int) -> Parallel:
    """FSDP within a node, and an all-reduce of each GPU's shard of the gradients across nodes."""
    inside, count = fsdp(parameters, min(world, NODE)), nodes(world)
    across = 2 * GRADIENT * parameters / NODE * (count - 1) / count
    return Parallel(inside.moved + across, inside.forward, inside.backward + across / FABRIC)


def compute_seconds(stage: Stage, world: int, peak: float) -> tuple[float, float]:
    """Forward and backward pass of a step on each GPU, at the assumed share of the peak."""
    backward = 2 * stage.trained.flops
    rate = world * peak * MFU / stage.batch
    return (stage.flops - backward) / rate, backward / rate


def exposed_seconds(stage: Stage, world: int, peak: float, way: Parallel) -> float:
    """The communication that the passes it belongs to do not hide."""
    forward, backward = compute_seconds(stage, world, peak)
    return max(0.0, way.forward - forward) + max(0.0, way.backward - backward)


# ----------------------------------------------------------------------------------------- contrastive loss


class Exchange(NamedTuple):
    """What the contrastive loss costs each GPU in a step, forward and backward.

    Args:
        bytes_held: of gathered features and their gradients, and of logits where they are stored.
        moved: bytes that it receives.
        wire: seconds of the exchange.
        product: seconds of the products with the logits.
    """

    bytes_held: float
    moved: float
    wire: float
    product: float


def _product(rows: float, columns: float, width: int, peak: float) -> float:
    """Logits, and the gradients of both features: three products."""
    return 3 * 2 * rows * columns * width / (peak * MFU)


def gathered_loss(batch: int, width: int, world: int, peak: float) -> Exchange:
    """`ClipLoss(local_loss=True)`: the texts are gathered, their gradients come back by a reduce-scatter, and
    each process multiplies its images with all texts; the logits are never stored."""
    total = 2 * batch * width
    seconds = 2 * gather_seconds(total, world)
    return Exchange(
        2 * total, 2 * gather_bytes(total, world), seconds, _product(batch / world, batch, width, peak)
    )


def global_loss(batch: int, width: int, world: int, peak: float) -> Exchange:
    """open_clip's default: both features are gathered, and each process computes the whole batch, with the
    float32 logits and their gradient stored. Without gather_with_grad nothing comes back."""
    total = 2 * batch * width
    return Exchange(
        2 * 2 * total + 2 * 4 * float(batch) ** 2,
        2 * gather_bytes(total, world),
        2 * gather_seconds(total, world),
        _product(batch, batch, width, peak),
    )


def ring_loss(batch: int, width: int, world: int, peak: float) -> Exchange:
    """A ring of neighbours (ppermute): each chunk of texts visits every GPU; in the backward pass it does so
    once more, together with its gradient.

    A hop between nodes has the port of one GPU, and all hops wait for it.
    """
    chunk = 2 * batch / world * width
    link = FABRIC if world > NODE else NVLINK
    hops = world - 1
    return Exchange(
        6 * chunk, 3 * hops * chunk, hops * (2 * HOP + 3 * chunk / link),
        _product(batch / world, batch, width, peak),
    )  # fmt: skip


def node_ring_loss(batch: int, width: int, world: int, peak: float) -> Exchange:
    """The texts are gathered within each node; these blocks go around a ring of nodes, all ports at once."""
    size, hops = min(world, NODE), nodes(world) - 1
    block = 2 * batch / nodes(world) * width
    moved = 3 * hops * block / size + 2 * gather_bytes(block, size) * nodes(world)
    seconds = hops * (2 * HOP + 3 * block / (NODE * FABRIC))
    inside = 2 * gather_seconds(block, size) * nodes(world)
    return Exchange(
        6 * block, moved, max(seconds, inside), _product(batch / world, batch, width, peak)
    )
