"""Bytes of a GPU and of a checkpoint.

The trainer keeps float32 weights, gradients, both moments of AdamW and the average of the weights: 20 bytes
for each parameter. Autocast adds a bfloat16 copy of the weights.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.scale.machine import FREE, GPU, HOST_LINK, WRITE_RATE, nodes
from benchmarks.scale.workload import Stage

STATE = 4 + 4 + 4 + 4 + 4  # weight, gradient, two moments, average
COPY = 2  # weight in bfloat16
SAVED = 4 + 4 + 4 + 4  # all of the state but the gradient
UNITS = 24  # FSDP gathers the weights of one block at a time, and the next one's. Assumption: equal blocks


def state_bytes(stage: Stage, shards: int) -> float:
    """Of weights, gradients, optimiser and average on each GPU, divided over `shards` GPUs (1: DDP)."""
    parameters = stage.trained.parameters
    gathered = COPY * parameters * (1 if shards == 1 else 2 / UNITS)
    return STATE * parameters / shards + gathered


def micro_batch(stage: Stage, gpu: GPU, shards: int) -> int:
    """The most samples whose activations fit next to the state; 0 if not even one does."""
    left = FREE * gpu.memory - state_bytes(stage, shards)
    return max(0, int(left / stage.trained.activations))


def update_seconds(stage: Stage, gpu: GPU, shards: int) -> float:
    """AdamW and the average: the state is read, and all of it but the gradient is written."""
    return (STATE + SAVED) * stage.trained.parameters / shards / gpu.memory_rate


class Checkpoint(NamedTuple):
    """Bytes in all, seconds that the training waits for the copy to the host, seconds until it is written."""

    total: float
    stall: float
    written: float


def checkpoint(stage: Stage, world: int) -> Checkpoint:
    """A sharded checkpoint that is written in the background: every process writes its part."""
    total = float(SAVED * stage.trained.parameters)
    return Checkpoint(total, total / world / HOST_LINK, total / nodes(world) / WRITE_RATE)
