"""Checkpoint: what is read from a folder of any layout, in the form of a folder of dalle2_fast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle2_fast.checkpoints.folder import construct
from dalle2_fast.checkpoints.formats.clip import ClipSource, read_clip
from dalle2_fast.checkpoints.weights import build, reject_leftovers, unfilled

PARTS = ("clip", "prior", "decoder", "upsampler", "upsampler2")
Part = tuple[dict[str, Any], dict[str, Tensor]]  # the arguments of one of our classes, and its weights


@dataclass
class Checkpoint:
    """A config, and tensors called "<part>.<key>".

    Args:
        path: where it was read; error messages begin with it.
        config: as in config.json of a folder of dalle2_fast.
        tensors: the weights, on the CPU, in the dtypes of the files.
        clip: a CLIP in a layout of others, whose weights get their names when the CLIP is made.

    Example:
        >>> checkpoint = Checkpoint(Path("folder"), {"model": "DALLE2"})
        >>> checkpoint.add("prior", ({"timesteps": 10}, {"weight": torch.zeros(2)}))
        >>> checkpoint.config["prior"], list(checkpoint.tensors)
        ({'timesteps': 10}, ['prior.weight'])
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    clip: ClipSource | None = None

    def add(self, name: str, part: Part) -> None:
        """Add the part called `name`: its arguments to the config, its weights to the tensors."""
        self.config[name] = part[0]
        self.tensors |= {f"{name}.{key}": tensor for key, tensor in part[1].items()}

    def add_clip(self, path: Path) -> None:
        """Add the CLIP whose file or folder is `path`, in any layout that `read_clip` knows."""
        self.clip = read_clip(path)
        self.config["clip"] = dict(self.clip.options)

    def reject_leftovers(self, parts: Collection[str]) -> None:
        """Raise CheckpointError if a tensor belongs to none of these parts."""
        reject_leftovers(self.tensors, parts, self.path)

    def make(
        self,
        kinds: Mapping[str, Callable[..., nn.Module]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, nn.Module]:
        """Build the modules of some parts, with their weights, in evaluation mode.

        The tensors are removed from the checkpoint as they are used: Karlo's fill 14 GB, which must not lie
        in memory twice.

        Args:
            kinds: part -> what makes it from its arguments.
            device: of the modules.
            dtype: of the floating-point weights.

        Returns:
            part -> module.

        Raises:
            CheckpointError: the weights do not fit; the message names the keys that are missing, left over or
                of another shape.
        """
        made = {}
        for name, kind in kinds.items():
            if name == "clip" and self.clip is not None:
                self._name_clip_weights(kind)
            own = {key: self.tensors.pop(key) for key in [*self.tensors] if key.startswith(f"{name}.")}
            made[name] = build(kind, self.config, own, name, self.path, device, dtype)
        return made

    def _name_clip_weights(self, kind: Callable[..., nn.Module]) -> None:
        with unfilled(self.clip.tensors):
            clip = construct(lambda options: kind(**options), self.config, "clip", self.clip.path)
        weights = self.clip.weights(clip.state_dict())
        self.tensors |= {f"clip.{key}": tensor for key, tensor in weights.items()}
        self.clip = None
