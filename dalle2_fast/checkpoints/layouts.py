"""Opening a checkpoint in any of the layouts that are known, told apart by files and keys.

    ours                    config.json with format_version, model.safetensors
    diffusers, a pipeline   model_index.json and a folder for each network
    diffusers, a prior      config.json of a PriorTransformer and its weights
    Karlo's original files  a .ckpt for each network, the statistics and the CLIP

Whatever it was, what comes out has the form of ours: a config, and tensors called "<part>.<key>".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle2_fast.checkpoints.errors import contents
from dalle2_fast.checkpoints.folder import (
    CONFIG_FILE,
    construct,
    embedded_path,
    load_config,
    load_folder,
)
from dalle2_fast.checkpoints.formats.clip import ClipSource, read_clip
from dalle2_fast.checkpoints.formats.diffusers import SAMPLING, Part, read_pipeline, read_prior
from dalle2_fast.checkpoints.formats.karlo import find_originals, read_original
from dalle2_fast.checkpoints.hub import locate
from dalle2_fast.checkpoints.weights import build, reject_leftovers, unfilled

PARTS = ("clip", "prior", "decoder", "upsampler", "upsampler2")
KNOWN = (
    "a folder of ours (config.json, model.safetensors), a diffusers UnCLIPPipeline (model_index.json), or "
    "Karlo's original .ckpt files"
)


@dataclass
class Checkpoint:
    """path: for messages; config, tensors: as in a folder of ours; clip: a CLIP in somebody else's layout."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    clip: ClipSource | None = None

    def add(self, name: str, part: Part) -> None:
        self.config[name] = part[0]
        self.tensors |= {f"{name}.{key}": tensor for key, tensor in part[1].items()}

    def reject_leftovers(self, parts: Collection[str]) -> None:
        """CheckpointError if a tensor belongs to none of these parts."""
        reject_leftovers(self.tensors, parts, self.path)

    def make(
        self,
        kinds: Mapping[str, Callable[..., nn.Module]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, nn.Module]:
        """{part: module with its weights, in evaluation mode}. The tensors are used up on the way: Karlo's
        fill 14 GB, and are not to lie there twice.

        kinds: what makes each part. Raises CheckpointError, which names the keys that are missing, left over
        or of another shape.
        """
        made = {}
        for name, kind in kinds.items():
            if name == "clip" and self.clip is not None:
                self._take_clip(kind)
            own = {key: self.tensors.pop(key) for key in [*self.tensors] if key.startswith(f"{name}.")}
            made[name] = build(kind, self.config, own, name, self.path, device, dtype)
        return made

    def _take_clip(self, kind: Callable[..., nn.Module]) -> None:
        with unfilled():
            clip = construct(lambda options: kind(**options), self.config, "clip", self.clip.path)
        weights = self.clip.weights(clip.state_dict())
        self.tensors |= {f"clip.{key}": tensor for key, tensor in weights.items()}
        self.clip = None


def open_checkpoint(
    path: str | os.PathLike | None = None,
    parts: Collection[str] = PARTS,
    *,
    revision: str | None = None,
) -> Checkpoint:
    """Read the checkpoint at `path`: a folder, an id of the Hugging Face hub, or None for the one that is
    installed with the package. Of a layout of others only `parts` are read.

    Raises FileNotFoundError for what is missing, CheckpointError (a ValueError) for what is damaged, unknown,
    or holds anything that is not plain weights; nothing in a file is ever run.
    """
    folder = embedded_path() if path is None else locate(path, revision)
    if not folder.is_dir():
        load_config(folder)  # says that there is no such folder, or that it is a file
    if (folder / "model_index.json").is_file():
        return _pipeline(folder, parts)
    if (folder / CONFIG_FILE).is_file():
        if _class_name(folder / CONFIG_FILE) is not None:
            return _network(folder)
        return Checkpoint(folder, *load_folder(folder, None if {*parts} == {*PARTS} else parts))
    if (originals := find_originals(folder)) is not None:
        return _originals(folder, originals, parts)
    raise FileNotFoundError(
        f"{folder}: no checkpoint: {CONFIG_FILE} is missing; expected {KNOWN}, got {contents(folder)}"
    )


def _pipeline(folder: Path, parts: Collection[str]) -> Checkpoint:
    found, tokenizer = read_pipeline(folder, parts)
    checkpoint = Checkpoint(folder, _chain("diffusers", tokenizer))
    if "prior" in parts and "prior" not in found:  # a pipeline of image variations
        checkpoint.config["prior_class"] = None
    for name, part in found.items():
        checkpoint.add(name, part)
    if "clip" in parts:
        _add_clip(checkpoint, folder)
    return checkpoint


def _network(folder: Path) -> Checkpoint:
    """One network of diffusers' on its own; its scheduler lies beside it, as in a pipeline."""
    beside = (folder.parent / name for name in ("prior_scheduler", "scheduler"))
    scheduler = next((place for place in beside if (place / "scheduler_config.json").is_file()), None)
    checkpoint = Checkpoint(folder, {"model": "DiffusionPrior"})
    checkpoint.add("prior", read_prior(folder, scheduler))
    return checkpoint


def _originals(folder: Path, originals: Any, parts: Collection[str]) -> Checkpoint:
    checkpoint = Checkpoint(folder, _chain("karlo", {"kind": "bpe", "context_length": 77, "merges": None}))
    for name, part in read_original(originals, parts).items():
        checkpoint.add(name, part)
    if "clip" in parts:
        _add_clip(checkpoint, originals.need("clip")[0])
    return checkpoint


def _chain(layout: str, tokenizer: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "DALLE2", "prior_class": "DiffusionPrior", **dict.fromkeys(PARTS), "tokenizer": tokenizer,
        "sampling": dict(SAMPLING), "metadata": {"layout": layout},
    }  # fmt: skip


def _add_clip(checkpoint: Checkpoint, path: Path) -> None:
    checkpoint.clip = read_clip(path)
    checkpoint.config["clip"] = dict(checkpoint.clip.options)


def _class_name(file: Path) -> str | None:
    """`_class_name` of a config.json of diffusers', None for any other content."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # load_config says it with more words
        return None
    return content.get("_class_name") if isinstance(content, dict) else None
