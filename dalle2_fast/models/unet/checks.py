"""Checks of the configuration and of the context of a U-Net."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def per_level(name: str, value: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """One int per level, from one int or a sequence of them; ValueError if their number is not `levels`.

    Example:
        >>> per_level("head_dim", 64, 3)
        (64, 64, 64)
    """
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels:
        raise ValueError(f"{name}: expected one int or one per level ({levels}), got {value!r}")
    return values


def check_widths(channels, layers, attention_levels, head_dims, num_groups, patch_size) -> None:
    """Raise ValueError unless these widths make a U-Net; see `UNet` for the arguments."""
    if not channels or min(channels) < 1 or patch_size < 1 or min(layers) < 1 or num_groups < 1:
        raise ValueError(
            "channels, layers_per_block, patch_size, num_groups: expected positive numbers, got "
            f"{channels}, {layers}, {patch_size}, {num_groups}"
        )
    if channels[0] % 2:
        raise ValueError(f"channels: expected an even first width (half sines, half cosines), got {channels}")
    for level, width in enumerate(channels):
        if width % num_groups:
            raise ValueError(f"num_groups: {num_groups} must divide every width, got channels {channels}")
        needs_heads = level in attention_levels or (attention_levels and level == len(channels) - 1)
        if needs_heads and width % head_dims[level]:
            raise ValueError(f"head_dim: {head_dims[level]} must divide the width {width} of level {level}")
    if any(not 0 <= level < len(channels) for level in attention_levels):
        raise ValueError(f"attention_levels: expected levels 0..{len(channels) - 1}, got {attention_levels}")


def check_fine(fine: dict[str, int], patch_size: int, num_groups: int) -> None:
    """Raise ValueError unless `fine` describes a level on smaller patches than those of the network."""
    names = ("patch_size", "channels", "layers")
    if set(fine) != set(names) or any(not isinstance(value, int) or value < 1 for value in fine.values()):
        raise ValueError(f"fine: expected positive ints {', '.join(names)}, got {fine!r}")
    if patch_size % fine["patch_size"] or patch_size == fine["patch_size"]:
        raise ValueError(
            f"fine: patch_size must divide the net's, {patch_size}, and be smaller, got {fine['patch_size']}"
        )
    if fine["channels"] % num_groups:
        raise ValueError(f"num_groups: {num_groups} must divide fine's channels, got {fine['channels']}")


def check_context(context: Tensor, mask: Tensor | None, cross_dim: int | None) -> None:
    """Raise ValueError unless the context is [B, S, cross_dim] and its mask bool [B, S]."""
    if cross_dim is None:
        raise ValueError(
            "encoder_hidden_states: this UNet has cross_dim=None and takes no context, got "
            f"{tuple(context.shape)}"
        )
    if context.ndim != 3 or context.shape[2] != cross_dim:
        raise ValueError(f"encoder_hidden_states: expected [B, S, {cross_dim}], got {tuple(context.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != context.shape[:2]):
        raise ValueError(
            f"attention_mask: expected bool [B, S] = {tuple(context.shape[:2])}, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
