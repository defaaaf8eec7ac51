"""A U-Net of a decoder of DALLE2-pytorch: its options, from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError
from dalle2_fast.checkpoints.formats.adm import shape_of
from dalle2_fast.checkpoints.formats.dalle2_pytorch.stored import Stored
from dalle2_fast.checkpoints.formats.renaming import count_numbers

# Options of the configuration that change the network and are not there, with the value that they may have.
_MISSING = {
    "self_cond": False, "resnet_weight_standardization": False, "combine_upsample_fmaps": False,
    "lowres_noise_cond": False,
}  # fmt: skip


def unet_of(
    stored: Stored, number: int, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of `Dalle2PytorchUnet`, and its weights under the newest names.

    Args:
        stored: a file with a decoder.
        number: of the U-Net, from 0.
        config: of the U-Net; it says what shapes do not.

    Raises:
        CheckpointError: tensors are missing, the version is not known, or an option is set that is not there.
    """
    file = stored.file
    for name, only in _MISSING.items():
        if config.get(name, only) != only:
            raise CheckpointError(f"{file}: {name}: expected {only}, the only value that can be loaded")
    tensors, version = _newest_names(stored, f"unets.{number}.")
    for part in ("upsample_combiner.", "to_lowres_noise_cond."):
        if any(name.startswith(part) for name in tensors):
            raise CheckpointError(f"{file}: unets.{number}.{part}: a U-Net with this part cannot be loaded")

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(tensors, name, dimensions, file)

    time_dim, dim = shape("to_time_hiddens.1.weight", 2)
    cond_dim, levels = shape("norm_cond.weight", 1)[0], count_numbers(tensors, "downs.")
    kernels = sorted(name for name in tensors if re.fullmatch(r"init_conv\.(convs\.\d+\.)?weight", name))
    if not kernels or not levels:
        raise CheckpointError(f"{file}: expected the blocks of a U-Net (unets.{number}.downs), got none")
    first = [shape(name, 4) for name in kernels]
    efficient = "init_resnet_block.block1.project.weight" in tensors
    ends = [shape(f"ups.{levels - 1 - level}.0.block1.project.weight", 4)[0] for level in range(levels)]
    dim_head = shape("mid_attn.fn.fn.null_kv", 2)[1]
    image = "image_to_tokens.0.weight" in tensors
    if not image and "to_image_hiddens.0.weight" in tensors:
        raise CheckpointError(
            f"{file}: image_to_tokens: a U-Net whose cond_dim is that of the image embedding cannot be loaded"
        )
    text = "text_to_cond.weight" in tensors
    in_channels, out = first[0][1], shape("to_out.weight", 4)
    groups = config.get("resnet_groups", 8)
    options = {
        "dim": dim, "widths": [sum(part[0] for part in first), *ends],
        "blocks": [count_numbers(tensors, f"downs.{level}.2.") for level in range(levels)],
        "attention": [_attention(tensors, level) for level in range(levels)],
        "groups": list(groups) if isinstance(groups, (list, tuple)) else [groups] * levels,
        "in_channels": in_channels, "channels_out": out[0], "cond_dim": cond_dim,
        "num_time_tokens": shape("to_time_tokens.0.weight", 2)[0] // cond_dim,
        "num_image_tokens": shape("null_image_embed", 3)[1],
        "image_embed_dim": shape("image_to_tokens.0.weight", 2)[1] if image else None,
        "image_in_time": "to_image_hiddens.0.weight" in tensors,
        "text_embed_dim": shape("text_to_cond.weight", 2)[1] if text else None,
        "max_text_len": shape("null_text_embed", 3)[1],
        "heads": shape("mid_attn.fn.fn.to_q.weight", 2)[0] // dim_head, "dim_head": dim_head,
        "first_kernels": [part[2] for part in first], "last_kernel": out[2], "memory_efficient": efficient,
        "down": _down(tensors, 0 if efficient else 4), "up": _up(tensors), "low_res_last": out[1] > dim,
        "cosine_sim_cross_attn": bool(config.get("cosine_sim_cross_attn", False)),
        "cosine_sim_self_attn": bool(config.get("cosine_sim_self_attn", False)),
        "scaled_twice": version >= (1, 4, 4), "unit_values": version >= (1, 4, 0),
        "skip_scale": 2**-0.5 if config.get("scale_skip_connection") else 1.0,
    }  # fmt: skip
    return options, tensors


def _newest_names(stored: Stored, prefix: str) -> tuple[dict[str, Tensor], tuple[int, int, int]]:
    """The tensors without the prefix, under the names of the newest version, and their version."""
    tensors = {name[len(prefix) :]: x for name, x in stored.tensors.items() if name.startswith(prefix)}
    if any(name.endswith(".gamma") for name in tensors):  # up to 0.15, which the names show
        renamed = {}
        for name, tensor in tensors.items():
            if name.endswith(".gamma"):
                name = name.removesuffix("gamma") + "g"
            if not name.endswith(".beta"):
                renamed[name.replace(".cross_attn.fn.", ".cross_attn.")] = tensor
        return renamed, (0, 15, 4)
    version = stored.known_version("the scale of its attention depends")
    return {name.replace(".cross_attn.fn.", ".cross_attn."): x for name, x in tensors.items()}, version


def _attention(tensors: Mapping[str, Tensor], level: int) -> str | None:
    if f"downs.{level}.3.fn.fn.to_q.weight" in tensors:
        return "self"
    return "linear" if f"downs.{level}.3.fn.to_qkv.weight" in tensors else None


def _down(tensors: Mapping[str, Tensor], place: int) -> str:
    if f"downs.0.{place}.convs.0.weight" in tensors:
        return "kernels"
    weight = tensors.get(f"downs.0.{place}.weight")
    return "conv" if weight is not None and weight.dim() == 4 and weight.shape[2] == 4 else "unshuffle"


def _up(tensors: Mapping[str, Tensor]) -> str:
    if "ups.0.3.net.0.weight" in tensors:
        return "shuffle"
    return "nearest" if "ups.0.3.1.weight" in tensors else "transposed"
