"""The network of a prior of DALLE2-pytorch: its options, from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError, listed
from dalle2_fast.checkpoints.formats.adm import shape_of
from dalle2_fast.checkpoints.formats.dalle2_pytorch.stored import Stored
from dalle2_fast.checkpoints.formats.renaming import count_numbers


def prior_network(stored: Stored) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of `PriorNetwork`, which follow from its tensors, and its weights under the newest names.

    Args:
        stored: a file with a prior.

    Raises:
        CheckpointError: tensors are missing, or the version is not known or not one that can be loaded.
    """
    file = stored.file
    others = [name for name in stored.tensors if not name.startswith(("net.", "noise_scheduler."))]
    if others:
        raise CheckpointError(f"{file}: the weights do not fit: left over {listed(others)}")
    tensors = {name[4:]: tensor for name, tensor in stored.tensors.items() if name.startswith("net.")}
    oldest = any(name.endswith(".gamma") for name in tensors)
    if oldest:  # up to version 0.15 a layer norm had a gain "gamma" and a constant "beta" of zeros
        tensors = {
            re.sub(r"\.gamma$", ".g", name): x for name, x in tensors.items() if not name.endswith(".beta")
        }
    transformer, first = "causal_transformer.", "causal_transformer.layers.0."
    padding = "masked"
    for name, kind in (("null_text_embed", "text"), ("null_text_encodings", "all")):
        padding = kind if name in tensors else padding
    if padding == "masked" and not oldest:
        raise CheckpointError(
            f"{file}: a prior of DALLE2-pytorch 0.16 to 0.22, with norms as no other version has them, or a "
            "damaged one (no null_text_encodings): it cannot be loaded"
        )
    cosine_sim = padding == "all"
    if padding == "text":
        cosine_sim = stored.known_version("whether its attention takes cosines depends") >= (1, 4, 4)
    dim = shape_of(tensors, "learned_query", 1, file)[0]
    dim_head = shape_of(tensors, f"{first}0.null_kv", 2, file)[1]
    inner = shape_of(tensors, f"{first}1.5.weight", 2, file)[1]
    if "to_time_embeds.0.weight" not in tensors and "to_time_embeds.0.1.net.0.0.weight" in tensors:
        raise CheckpointError(f"{file}: a prior with continuous times (no num_timesteps) cannot be loaded")
    times, width = shape_of(tensors, "to_time_embeds.0.weight", 2, file)
    nulls = {"text": "null_text_embed", "all": "null_text_encodings"}.get(padding)
    options = {
        "dim": dim, "depth": count_numbers(tensors, f"{transformer}layers."),
        "heads": shape_of(tensors, f"{first}0.to_q.weight", 2, file)[0] // dim_head, "dim_head": dim_head,
        "ff_inner": inner, "num_timesteps": times, "num_time_embeds": width // dim,
        "num_image_embeds": _several(tensors, "to_image_embeds.0.weight", dim),
        "num_text_embeds": _several(tensors, "to_text_embeds.0.weight", dim),
        "max_text_len": shape_of(tensors, nulls, 3, file)[1] if nulls else None, "padding": padding,
        "cosine_sim": cosine_sim, "divides": not oldest,
        "bias_scale": 128.0 if padding == "text" and not cosine_sim else 1.0,
        "norm_in": f"{transformer}init_norm.g" in tensors,
        "norm_out": f"{transformer}norm.g" in tensors,
        "final_proj": f"{transformer}project_out.weight" in tensors, "normformer": f"{first}1.3.g" in tensors,
        "rotary_emb": _rotates(tensors, stored),
    }  # fmt: skip
    for name in [name for name in tensors if name.endswith("rotary_emb.freqs")]:
        _check_frequencies(tensors.pop(name), min(32, dim_head), name, file)
    return options, {f"net.{name}": x for name, x in tensors.items()}


def _rotates(tensors: Mapping[str, Tensor], stored: Stored) -> bool:
    """Whether queries and keys are rotated: the frequencies are there, or the configuration denies it."""
    net = stored.config.get("net")
    if any("rotary_emb." in name for name in tensors):
        return True
    if isinstance(net, Mapping) and net.get("rotary_emb") is False:
        return False
    raise CheckpointError(
        f"{stored.file}: rotary_emb: the file has no frequencies of a rotation; where the prior was trained "
        'without it, pass a config with "net": {"rotary_emb": false}'
    )


def _several(tensors: Mapping[str, Tensor], name: str, dim: int) -> int:
    return tensors[name].shape[0] // dim if name in tensors else 1


def _check_frequencies(found: Tensor, size: int, name: str, file: Path) -> None:
    expected = 10000.0 ** (-torch.arange(0, size, 2) / size)
    if found.is_meta:
        return
    if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=1e-2):
        raise CheckpointError(f"{file}: {name}: expected the frequencies 10000 ** (-2 i / {size})")
