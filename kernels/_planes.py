"""How element-wise kernels read [B, C, *] tensors of several memory layouts without copies.

Three strides, of samples, channels and positions, describe every usual layout: contiguous, channels_last,
and a slice of the channels of either. If the samples of all tensors of a call are contiguous, a sample is
taken as one channel of C * positions, so that one load instruction reads 16 bytes. Kernels address all
layouts in the same way.
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
    """The memory format of a result that has the layout of x."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _strides(value: Tensor) -> tuple[int, int, int] | None:
    """Strides of samples, channels and positions. None if the positions have no common stride."""
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
    # A dimension of size 1 may have any stride. Use one fixed value, so that fewer kernels are compiled.
    channel = stride[1] if channels > 1 else position * positions
    sample = stride[0] if shape[0] > 1 else channel * channels
    return sample, channel, position


def arrange(values: list[Tensor | None]) -> tuple[list[Tensor | None], Planes]:
    """Tensors that a kernel can read, and their planes.

    Only a tensor that three strides do not describe is copied. All tensors have the same number of positions.
    The first has C channels, the others have at least C.
    """
    # The usual case, in a third of the time.
    if all(value is None or value.is_contiguous() for value in values):
        positions = values[0].numel() // values[0].shape[0]
        samples = [0 if value is None else value.numel() // value.shape[0] for value in values]
        strides = [(sample, positions, 1) if sample else (0, 0, 0) for sample in samples]
        return values, Planes(1, positions, strides)
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
    """(elements per tile, warps) of an element-wise kernel, from the number of positions of a channel.

    A thread takes 4 elements where a sample is small, so that a few samples occupy more of the GPU. Otherwise
    it takes 16, which is two loads of 16 bytes in bfloat16: on an H200 a diffusion step of 64 images
    3x256x256 takes 42 us, and 46 us with 8 elements. The batch size has no influence.
    """
    return (512, 4) if positions <= 65536 else (2048, 4)


def count_tiles(channels: int, positions: int, size: int) -> int:
    """Tiles of `size` elements per channel. The first begins at a multiple of four elements of the sample."""
    return -(-(positions + (3 if channels > 1 and positions % 4 else 0)) // size)


def check_size(name: str, value: Tensor) -> None:
    """Kernels count a sample's elements in int32, up to twice its size (a learned range has 2C channels)."""
    elements = value.numel() // value.shape[0]
    if elements >= 2**30:
        raise ValueError(f"{name}: expected fewer than 2**30 elements per sample, got {elements}")
