"""`save_pretrained` and `from_pretrained` of a network on its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from dalle2_fast.checkpoints.errors import CheckpointError
from dalle2_fast.checkpoints.folder import save_folder
from dalle2_fast.checkpoints.layouts import open_checkpoint

Model = TypeVar("Model", bound="Pretrained")


class Pretrained:
    """A module with a `config`, the JSON-able arguments of its class, that is saved and loaded.

    part: its name in the checkpoint of a whole chain, from which it can be loaded, too.
    """

    part: ClassVar[str]
    config: dict[str, Any]

    def save_pretrained(self, path: str | os.PathLike, *, dtype: torch.dtype | None = None) -> Path:
        """Write a checkpoint folder (config.json, model.safetensors) and return it.

        Atomic: an earlier checkpoint there stays whole until the new one is complete. `dtype`: store
        floating-point weights in it (torch.bfloat16 halves the file); None keeps theirs.
        """
        config = {"model": type(self).__name__, self.part: self.config}
        tensors = {f"{self.part}.{key}": tensor for key, tensor in self.state_dict().items()}
        return save_folder(path, config, tensors, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | os.PathLike | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        part: str | None = None,
    ) -> Model:
        """Load it, in evaluation mode, from its own folder or out of a whole chain's, in any layout that
        DALLE2.from_pretrained knows, or by an id of the Hugging Face hub; None is the chain that is installed
        with the package.

        dtype: of the weights, whatever the file stores. part: which one of a chain, where it has two of a
        kind ("upsampler2"). Raises FileNotFoundError for a missing folder or file, CheckpointError (a
        ValueError) for a damaged or unknown one and for another model, naming the keys that are missing, left
        over or of another shape.
        """
        part = cls.part if part is None else part
        checkpoint = open_checkpoint(path, [part], revision=revision)
        config, name = checkpoint.config, cls.__name__
        model = config.get("model")
        if model == "DALLE2":
            held = config.get("prior_class", "DiffusionPrior") if part == "prior" else name
            if held != name or config.get(part) is None:
                came = f"a {held}" if held not in (name, None) else "none"
                raise CheckpointError(
                    f"{checkpoint.path}: expected a chain with a {name} as its {part}, got {came}"
                )
        elif model != name:
            raise CheckpointError(f"{checkpoint.path}: expected a {name} or a whole chain, got {model!r}")
        else:
            part = cls.part
            checkpoint.reject_leftovers([part])
        return checkpoint.make({part: cls}, device, dtype)[part]
