"""Sharded tensors (DTensors of FSDP2) next to plain ones."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process has; other tensors unchanged."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like_shard(full: Tensor, shard: Tensor) -> Tensor:
    """A tensor that every process has, divided as `shard` is; unchanged if that is no shard."""
    if not isinstance(shard, DTensor):
        return full
    whole = DTensor.from_local(
        full.to(shard.device), shard.device_mesh, [Replicate()] * shard.device_mesh.ndim, run_check=False
    )
    return whole.redistribute(placements=shard.placements)


def whole(part: Tensor, shard: Tensor) -> Tensor:
    """The tensor of which each process has a `part`, divided as `shard` is; unchanged if that is no shard."""
    if not isinstance(shard, DTensor):
        return part
    return DTensor.from_local(
        part, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
    ).full_tensor()
