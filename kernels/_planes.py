"""How a kernel that works element by element reads [B, C, *] tensors of several layouts, without copies.

Every usual layout (contiguous, channels_last, a slice of the channels of either) is three strides: of
samples, channels and positions. If every tensor of a call lies contiguous within its samples, a sample is
taken as one channel of C * positions, and the loads are wide. A kernel so has one way of addressing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Planes(NamedTuple):
    """`channels` planes of `positions` elements; strides: (sample, channel, position) of each tensor."""

    channels: int
    positions: int
    strides: list[tuple[int, int, int]]


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of results that should lie as x does."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _strides(value: Tensor) -> tuple[int, int, int] | None:
    """Strides of samples, channels and positions; None where the positions have no common stride."""
    shape, stride = value.shape, value.stride()
    channels = shape[1] if value.dim() > 1 else 1
    positions, position = 1, 1
    for size, step in zip(reversed(shape[2:]), reversed(stride[2:]), strict=True):
        if size == 1:
            continue
        if positions == 1:
            position = step
        elif step != position * positions:
            return None
        positions *= size
    # A dimension of size 1 may have any stride; a canonical one keeps the number of compiled kernels down.
    channel = stride[1] if channels > 1 else position * positions
    sample = stride[0] if shape[0] > 1 else channel * channels
    return sample, channel, position


def arrange(values: list[Tensor | None]) -> tuple[list[Tensor | None], Planes]:
    """Tensors that a kernel can read, copied only where three strides do not describe one, and their planes.

    All have one number of positions. The first has the number of channels; others may have more.
    """
    strides = []
    for index, value in enumerate(values):
        if value is None:
            strides.append((0, 0, 0))
            continue
        found = _strides(value)
        if found is None:
            values[index] = value.contiguous()
            found = _strides(values[index])
        strides.append(found)
    shape = values[0].shape
    channels, positions = (shape[1] if len(shape) > 1 else 1), math.prod(shape[2:])
    present = [found for found, value in zip(strides, values, strict=True) if value is not None]
    if all(position == 1 and channel == positions for _, channel, position in present):
        channels, positions = 1, channels * positions
        strides = [(sample, positions, position) for sample, _, position in strides]
    return values, Planes(channels, positions, strides)


def tile_config(positions: int) -> tuple[int, int]:
    """(elements of a tile, warps) of an element-wise kernel, by the positions of a channel.

    4 elements a thread where a sample is small, so that a few samples fill more of the device; 16 where there
    is enough of it: two loads of 16 bytes of bfloat16 (H200, a step of 64 pictures of 3x256x256: 42 us, with
    8 elements 46). The batch decides nothing.
    """
    return (512, 4) if positions <= 65536 else (2048, 4)


def count_tiles(channels: int, positions: int, size: int) -> int:
    """Tiles of `size` per channel, where the first begins at the last multiple of four elements up to it."""
    return -(-(positions + (3 if channels > 1 and positions % 4 else 0)) // size)


def check_size(name: str, value: Tensor) -> None:
    """Within a sample, kernels count in int32, up to twice its size (a learned range has 2C channels)."""
    elements = value.numel() // value.shape[0]
    if elements >= 2**30:
        raise ValueError(f"{name}: expected fewer than 2**30 elements per sample, got {elements}")
