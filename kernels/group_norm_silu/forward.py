"""y = act((x - mean) rstd weight (1 + scale) + bias (1 + scale) + shift), mean and rstd over a sample's group

Group norm, an optional scale and shift per sample (FiLM) and SiLU. A group's slab (see _plan.py) decides on
the kernels (_forward_whole.py, _forward_chunks.py):

- It fits into the registers of a program: one kernel, 1 read and 1 write, 4 bytes per element in bfloat16.
- It fits into L1 or L2: one kernel, which reads the slab a second time, from there.
- Otherwise two kernels. The second one reads x again, from L2 if the tensor fits into it.

All sums, also those of squares, are of x minus a number near the slab's mean, so that a mean of 1e3 with a
standard deviation of 1 costs no accuracy.

The op runs in the dtype of x, also under autocast; the maths is float32 and is rounded once. The gradient is
in backward.py, the tangent in tangent.py, and _plan.py decides what a program covers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import implement
from . import _plan as plan
from . import backward, tangent  # noqa: F401  implement the derivatives
from ._forward_chunks import _apply_kernel, _moments_kernel
from ._forward_whole import _looped_kernel, _resident_kernel
from .op import empty_outputs, group_norm_silu


def _forward(
    x: Tensor,  # [N, C, *]
    num_groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    scale: Tensor | None,  # [N, C]
    shift: Tensor | None,  # [N, C]
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, C, *] in the memory format of x; mean and rstd [N, G] in float32."""
    y, mean, rstd = empty_outputs(x, num_groups)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    source = plan.view(x)
    weight, bias, scale, shift = (plan.rows(value) for value in (weight, bias, scale, shift))
    samples, channels = x.shape[:2]
    width = channels // num_groups
    shape = (width, num_groups, source.positions, source.channels_adjacent, x.element_size())
    affine = (weight, bias, scale, shift, eps, plan.row_stride(scale), plan.row_stride(shift))
    sizes = (num_groups, channels, source.positions)
    strides = (source.sample_stride, y.stride(0), source.channel_stride, source.position_stride)
    with torch.cuda.device_of(x):
        kernel, tiles = _resident_kernel, plan.resident_tiles(*shape, plan.RESIDENT_LANES)
        if tiles is None:
            kernel = _looped_kernel
            tiles = plan.forward_tiles(*shape, plan.FORWARD_LANES, plan.FORWARD_WARPS, plan.FORWARD_MAX_LANES)
        if tiles is not None:
            kernel[(samples * plan.divide_up(num_groups, tiles.groups),)](
                source.tensor, y, mean, rstd, *affine, *sizes, *strides,
                INT64=source.int64_offsets, WIDTH=width, GROUPS=tiles.groups,
                CHANNELS=tiles.channels, POSITIONS=tiles.positions,
                CHANNEL_TILES=tiles.channel_tiles, POSITION_TILES=tiles.position_tiles, EXACT=tiles.exact,
                SILU=silu, num_warps=tiles.warps,
            )  # fmt: skip
            return y, mean, rstd

        tiles = plan.chunk_tiles(*shape, plan.CHUNK_LANES, plan.CHUNK_WARPS)
        blocks = samples * plan.divide_up(num_groups, tiles.groups)
        max_chunks = plan.merged_chunks(tiles)
        chunks, each = plan.chunks(tiles.count, blocks, x.device, max_chunks, source.channels_adjacent)
        slabs = samples * num_groups
        partial = mean.new_empty((4, slabs, chunks))
        constants = dict(
            INT64=source.int64_offsets, WIDTH=width, GROUPS=tiles.groups,
            CHANNELS=tiles.channels, POSITIONS=tiles.positions,
            CHANNEL_TILES=tiles.channel_tiles, EXACT=tiles.exact, num_warps=tiles.warps,
        )  # fmt: skip
        _moments_kernel[(blocks * chunks,)](
            source.tensor, partial, *sizes, strides[0], *strides[2:], slabs, chunks, each, **constants
        )
        _apply_kernel[(blocks * chunks,)](
            source.tensor, y, mean, rstd, partial, *affine, *sizes, *strides, slabs, chunks, each,
            **constants, SILU=silu, MAX_CHUNKS=max_chunks,
        )  # fmt: skip
    return y, mean, rstd


implement(group_norm_silu, _forward)
