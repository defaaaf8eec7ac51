"""Which tensors of Karlo, guided-diffusion and GLIDE make those of our U-Nets.

Karlo's original files name the blocks of an ADM U-Net as guided-diffusion and GLIDE do. The classes of
diffusers are UNet2DConditionModel and UNet2DModel. The blocks run in the same order everywhere, but they are
numbered differently. Ours numbers the layers. The original numbers the stations at which a skip connection
begins or ends, so that a block that doubles the resolution is a part of the station before it. diffusers
numbers the levels.

karlo_keys.py says the same of the other networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dalle2_fast.checkpoints.formats.renaming import Rules, parts_first, renamed, stacked, without_kernel_axis


@dataclass(frozen=True)
class Block:
    """The names of a residual block and of the attention after it, if there is one."""

    ours: str  # prefix of both: "<ours>.res", "<ours>.attention"
    original: str  # the station
    number: int  # of the block in its station; the attention has the next number
    diffusers: str  # of the block; the attention is called "attentions" instead of "resnets"
    attends: bool  # whether there is an attention
    skips: bool  # whether the skip is a convolution, because the block changes the width
    level: int  # of the block


def unet_blocks(
    channels: Sequence[int], layers: Sequence[int], attention_levels: Sequence[int]
) -> Iterator[Block]:
    """The blocks in the order in which they run.

    Args:
        channels: of each level, as for our UNet.
        layers: blocks of each level on the way down; there is one more on the way up.
        attention_levels: the levels whose blocks have attention.

    Example:
        >>> [block.ours for block in unet_blocks([8, 16], [1, 1], [])][:4]
        ['down.0', 'down.1', 'down.2', 'middle.0']
    """
    width, skips, down = channels[0], [channels[0]], 0
    for level, after in enumerate(channels):
        attends = level in attention_levels
        for index in range(layers[level]):
            theirs = (f"input_blocks.{down + 1}", 0, f"down_blocks.{level}.resnets.{index}")
            yield Block(f"down.{down}", *theirs, attends, width != after, level)
            width, down = after, down + 1
            skips.append(width)
        if level < len(channels) - 1:
            theirs = (f"input_blocks.{down + 1}", 0, f"down_blocks.{level}.downsamplers.0")
            yield Block(f"down.{down}", *theirs, False, False, level)
            down += 1
            skips.append(width)

    attends, last = len(attention_levels) > 0, len(channels) - 1
    yield Block("middle.0", "middle_block", 0, "mid_block.resnets.0", attends, False, last)
    yield Block("middle.1", "middle_block", 1 + attends, "mid_block.resnets.1", False, False, last)

    up = station = 0
    for number, level in enumerate(reversed(range(len(channels)))):
        after, attends = channels[level], level in attention_levels
        for index in range(layers[level] + 1):
            theirs = (f"output_blocks.{station}", 0, f"up_blocks.{number}.resnets.{index}")
            yield Block(f"up.{up}", *theirs, attends, width + skips.pop() != after, level)
            width, up, station = after, up + 1, station + 1
        if level > 0:
            theirs = (f"output_blocks.{station - 1}", 1 + attends, f"up_blocks.{number}.upsamplers.0")
            yield Block(f"up.{up}", *theirs, False, False, level)
            up += 1


_RES = {
    # ours: (the original's, diffusers')
    "norm1": ("in_layers.0", "norm1"),
    "conv1": ("in_layers.2", "conv1"),
    "embed": ("emb_layers.1", "time_emb_proj"),
    "norm2": ("out_layers.0", "norm2"),
    "conv2": ("out_layers.3", "conv2"),
    "skip": ("skip_connection", "conv_shortcut"),
}


def original_rules(unet: Mapping[str, Any], heads_first: bool = True) -> Rules:
    """The rules for a U-Net of Karlo's original files, of guided-diffusion and of GLIDE.

    Its projections are convolutions.

    Args:
        unet: the arguments of our UNet.
        heads_first: whether their rows are [heads, 3, head_dim], which hold the queries, keys and values of
            each head together, or ours, [3, heads, head_dim].
    """
    rules = (
        renamed("time_embed.0", "time_embed.0")
        | renamed("time_embed.2", "time_embed.2")
        | renamed("conv_in", "input_blocks.0.0")
        | renamed("norm_out", "out.0")
        | renamed("conv_out", "out.2")
    )
    head_dims, context = unet["head_dim"], unet["cross_dim"] is not None
    for block in _blocks(unet):
        theirs = f"{block.original}.{block.number}"
        for ours, (name, _) in _RES.items():
            if ours != "skip" or block.skips:
                rules |= renamed(f"{block.ours}.res.{ours}", f"{theirs}.{name}")
        if block.attends:
            ours, theirs = f"{block.ours}.attention", f"{block.original}.{block.number + 1}"
            head_dim = head_dims if isinstance(head_dims, int) else head_dims[block.level]
            rules |= renamed(f"{ours}.norm", f"{theirs}.norm")
            reorder = parts_first(3, head_dim) if heads_first else without_kernel_axis
            rules |= renamed(f"{ours}.qkv", f"{theirs}.qkv", reorder)
            if context:
                rules |= renamed(f"{ours}.context_kv", f"{theirs}.encoder_kv", parts_first(2, head_dim))
            rules |= renamed(f"{ours}.project", f"{theirs}.proj_out", without_kernel_axis)
    return rules


def diffusers_rules(unet: Mapping[str, Any]) -> Rules:
    """The rules for a UNet2DConditionModel or UNet2DModel.

    Args:
        unet: the arguments of our UNet.
    """
    rules = (
        renamed("time_embed.0", "time_embedding.linear_1")
        | renamed("time_embed.2", "time_embedding.linear_2")
        | renamed("conv_in", "conv_in")
        | renamed("norm_out", "conv_norm_out")
        | renamed("conv_out", "conv_out")
    )
    for block in _blocks(unet):
        for ours, (_, name) in _RES.items():
            if ours != "skip" or block.skips:
                rules |= renamed(f"{block.ours}.res.{ours}", f"{block.diffusers}.{name}")
        if block.attends:
            ours, theirs = f"{block.ours}.attention", block.diffusers.replace("resnets", "attentions")
            rules |= renamed(f"{ours}.norm", f"{theirs}.group_norm")
            rules |= stacked(f"{ours}.qkv", *(f"{theirs}.to_{part}" for part in "qkv"))
            rules |= stacked(f"{ours}.context_kv", *(f"{theirs}.add_{part}_proj" for part in "kv"))
            rules |= renamed(f"{ours}.project", f"{theirs}.to_out.0")
    return rules


def _blocks(unet: Mapping[str, Any]) -> Iterator[Block]:
    return unet_blocks(unet["channels"], unet["layers_per_block"], unet["attention_levels"])
