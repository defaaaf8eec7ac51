"""Collective operations on the rows of all processes: n rows on each of W processes, N = W n in total."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def gather(rows: Tensor) -> Tensor:  # [n, ...] -> [N, ...]
    gathered = rows.new_empty((dist.get_world_size() * rows.shape[0], *rows.shape[1:]))
    # torch 2.13 has the newer name and warns at the older one.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, rows.contiguous())
    return gathered


def reduce_scatter(rows: Tensor) -> Tensor:  # [N, ...] -> [n, ...], the sum over processes of the local rows
    local = rows.new_empty((rows.shape[0] // dist.get_world_size(), *rows.shape[1:]))
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce(local, rows.contiguous())
    return local


def all_reduce(value: Tensor) -> Tensor:
    total = value.clone()
    dist.all_reduce(total)
    return total


def all_reduce_lse(lse: Tensor) -> Tensor:  # [N] -> [N], the log-sum-exp over processes
    largest = lse.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest + all_reduce((lse - largest).exp()).log()  # NaN where lse is infinite or NaN
