"""The file model.safetensors of a finished stage: averaged weights, with the configuration in the header."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import write_file


def save_weights(path: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file with the configuration (JSON) in its header, so that they stay together.

    Args:
        path: of the file.
        config: JSON-able; its entry "model" holds the arguments of the model's constructor.
        tensors: the model's state by name, on any device.

    Raises:
        TrainingError: the file cannot be written.
    """
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    write_file(path, safetensors.torch.save(tensors, metadata={"config": json.dumps(config)}))


def load_weights(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read back what `save_weights` wrote: (config, tensors).

    Raises:
        TrainingError: the file cannot be read, or has no configuration in its header.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
            return config, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path}: not a readable weights file of this library ({error})") from error


def load_config(path: Path) -> dict:
    """The configuration in the header of such a file, without its tensors.

    Raises:
        TrainingError: as of `load_weights`.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()["config"]))
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path}: not a readable weights file of this library ({error})") from error
