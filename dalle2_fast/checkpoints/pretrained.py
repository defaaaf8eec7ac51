"""`save_pretrained` and `from_pretrained` of a single network."""

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
    """Base of modules that are saved with their `config`, the JSON-able arguments of the class.

    Attributes:
        part: the name of the module in the checkpoint of a DALLE2, from which it can also be loaded.
        config: the arguments with which `type(self)(**config)` makes the module again.

    Example:
        >>> class Scale(Pretrained, torch.nn.Module):
        ...     part = "scale"
        ...     def __init__(self, size: int):
        ...         super().__init__()
        ...         self.config = {"size": size}
        ...         self.weight = torch.nn.Parameter(torch.ones(size))
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(file.name for file in Scale(3).save_pretrained(folder).iterdir())
        ['config.json', 'model.safetensors']
    """

    part: ClassVar[str]
    config: dict[str, Any]

    def save_pretrained(self, path: str | os.PathLike, *, dtype: torch.dtype | None = None) -> Path:
        """Write a checkpoint folder (config.json, model.safetensors).

        An interruption at any time leaves the previous checkpoint of the folder or the new one.

        Args:
            path: the folder; it is created if it does not exist.
            dtype: floating-point weights are stored in it (bfloat16 halves the file); None keeps theirs.

        Returns:
            The folder.

        Raises:
            OSError: a file cannot be written; the message names it.
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
        """Load the module, in evaluation mode, from its checkpoint or from that of a DALLE2.

        Args:
            path: a folder in any layout that DALLE2.from_pretrained reads, or an id of the Hugging Face hub.
                None takes the checkpoint that is installed with the package.
            device: of the module.
            dtype: of the weights, regardless of the dtype of the file.
            revision: a branch, tag or commit, for an id of the hub.
            part: the name of the part if a DALLE2 has two of the kind ("upsampler2").

        Raises:
            FileNotFoundError: the folder or a file is missing.
            CheckpointError: a ValueError; the checkpoint is damaged, unknown or of another model. The message
                names the keys that are missing, left over or of another shape.

        Example:
            >>> from dalle2_fast import Upsampler
            >>> Upsampler.from_pretrained().part
            'upsampler'
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
                    f"{checkpoint.path}: expected a DALLE2 with a {name} as its {part}, got {came}"
                )
        elif model != name:
            raise CheckpointError(f"{checkpoint.path}: expected a {name} or a DALLE2, got {model!r}")
        else:
            part = cls.part
            checkpoint.reject_leftovers([part])
        return checkpoint.make({part: cls}, device, dtype)[part]
