"""The arguments of our UNet, from the shapes of an ADM U-Net in the layout of guided-diffusion.

Karlo's original files, guided-diffusion and GLIDE have this layout; unet_keys.py has its names of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError
from dalle2_fast.checkpoints.formats.renaming import count_numbers


def unet_options(
    tensors: Mapping[str, Tensor],
    prefix: str,
    file: Path,
    head_dim: int | None = None,
    heads: int | None = None,
) -> dict[str, Any]:
    """The arguments of our UNet, from the shapes of an original one.

    The levels are found on the way up: each but the last ends with a block that doubles the resolution, and
    each has one block more than on the way down.

    Args:
        tensors: name -> tensor.
        prefix: the U-Net's names begin with it.
        file: error messages begin with it.
        head_dim: width of an attention head, which the shapes do not show.
        heads: the number of attention heads, instead of head_dim.

    Raises:
        CheckpointError: there is no such U-Net, or one that our UNet cannot be.
    """
    _refuse_other_kinds(tensors, prefix, file)
    channels, layers, attends, blocks = [], [], [], 0
    stations = count_numbers(tensors, f"{prefix}output_blocks.")
    for station in range(stations):
        begin, blocks = f"{prefix}output_blocks.{station}.", blocks + 1
        attention = f"{begin}1.qkv.weight" in tensors
        last = station == stations - 1
        if last or f"{begin}{1 + attention}.in_layers.2.weight" in tensors:
            channels.append(shape_of(tensors, f"{begin}0.out_layers.3.weight", 4, file)[0])
            layers.append(blocks - 1)
            attends.append(attention)
            blocks = 0
    channels, layers, attends = channels[::-1], layers[::-1], attends[::-1]
    if not channels or min(layers) < 1:
        raise CheckpointError(f"{file}: {prefix}output_blocks: expected the blocks of a U-Net, got {layers}")
    levels = [level for level, here in enumerate(attends) if here]
    if not levels and f"{prefix}middle_block.1.qkv.weight" in tensors:
        raise CheckpointError(
            f"{file}: {prefix}middle_block.1: attention in the middle alone, which our UNet does not have"
        )
    film, width = shape_of(tensors, f"{prefix}input_blocks.1.0.emb_layers.1.weight", 2, file)
    first = shape_of(tensors, f"{prefix}input_blocks.0.0.weight", 4, file)
    cross = f"{prefix}middle_block.1.encoder_kv.weight"
    return {
        "in_channels": first[1],
        "out_channels": shape_of(tensors, f"{prefix}out.2.weight", 4, file)[0],
        "channels": channels, "layers_per_block": layers, "attention_levels": levels,
        "head_dim": _head_dims(channels, levels, head_dim, heads, file),
        "cross_dim": shape_of(tensors, cross, 3, file)[1] if cross in tensors else None, "embed_dim": width,
        "film": film == 2 * channels[0],
    }  # fmt: skip


def shape_of(tensors: Mapping[str, Tensor], name: str, dimensions: int, file: Path) -> tuple[int, ...]:
    """The shape of a tensor; CheckpointError if it is missing or has another number of dimensions."""
    if name not in tensors:
        raise CheckpointError(f"{file}: the weights do not fit: missing 1 ({name})")
    if tensors[name].dim() != dimensions:
        came = list(tensors[name].shape)
        raise CheckpointError(f"{file}: {name}: expected {dimensions} dimensions, got {came}")
    return tuple(tensors[name].shape)


def _head_dims(
    channels: list[int], levels: list[int], head_dim: int | None, heads: int | None, file: Path
) -> int | list[int]:
    if heads is None:
        return 64 if head_dim is None else head_dim
    for level in levels:
        if heads < 1 or channels[level] % heads:
            raise CheckpointError(
                f"{file}: expected a number of heads that divides the width {channels[level]}, got {heads}"
            )
    return [max(1, width // heads) for width in channels]


def _refuse_other_kinds(tensors: Mapping[str, Tensor], prefix: str, file: Path) -> None:
    """Raise CheckpointError for a network whose names are similar, but which our UNet cannot be."""
    if any(name.startswith(f"{prefix}input_blocks.") for name in tensors) and not any(
        name.startswith(f"{prefix}output_blocks.") for name in tensors
    ):
        raise CheckpointError(
            f"{file}: a network without {prefix}output_blocks, such as a classifier of noisy images; "
            "expected a U-Net"
        )
    for name in tensors:
        if name.startswith(prefix) and name.endswith((".op.weight", ".conv.weight")):
            raise CheckpointError(
                f"{file}: {name}: this U-Net changes the resolution by a convolution, ours in "
                "residual blocks (resblock_updown=True)"
            )
