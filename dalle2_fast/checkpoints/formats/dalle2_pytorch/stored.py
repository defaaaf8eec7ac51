"""The files of DALLE2-pytorch's trainers, and the networks alone: which weights they hold, of which version.

A trainer stores a dict: the module as "model", its average over the steps ("ema_model" of a prior, "ema" with
"<number>.ema_model." of the U-Nets of a decoder), the optimisers, "version" and, sometimes, "config". A file
of weights alone is the state_dict of a DiffusionPrior or a Decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError, listed
from dalle2_fast.checkpoints.tensor_files import (
    SUFFIXES,
    Ignored,
    read_json,
    read_tensors,
    read_torch,
)

# A trainer pickles its version number, and may pickle its optimiser's warm-up. They are not needed, so that
# empty objects take their places: the code of these packages is not run.
_IGNORED = ("packaging.", "pytorch_warmup.", "torch.optim.")
_NUMBER = re.compile(r"(\d+)\.(\d+)\.(\d+)")


@dataclass
class Stored:
    """What a file of DALLE2-pytorch holds.

    Args:
        file: error messages begin with it.
        tensors: the weights that were chosen, without those of a CLIP.
        version: of DALLE2-pytorch, such as (1, 11, 0); None if it is unknown.
        config: as in the JSON file of the trainer; empty if it is unknown.
        averaged: whether the weights are the average over the steps.
    """

    file: Path
    tensors: dict[str, Tensor]
    version: tuple[int, int, int] | None
    config: dict[str, Any]
    averaged: bool

    def known_version(self, why: str) -> tuple[int, int, int]:
        """The version, of the later ones that can be loaded.

        Args:
            why: the beginning of the message if it is unknown, such as "its shape depends".

        Raises:
            CheckpointError: it is unknown, or one that cannot be loaded.
        """
        if self.version is None:
            raise CheckpointError(
                f"{self.file}: {why} on the version: pass version=..., that of DALLE2-pytorch with which it "
                "was trained"
            )
        if self.version < (0, 23, 6):
            came = ".".join(map(str, self.version))
            raise CheckpointError(f"{self.file}: version: expected one up to 0.15 or from 0.23.6, got {came}")
        return self.version


def read_stored(
    path: str | PathLike,
    kind: str,
    config: Mapping[str, Any] | str | PathLike | None = None,
    version: str | None = None,
    ema: bool | None = None,
) -> Stored:
    """Read a file of DALLE2-pytorch.

    Args:
        path: the file.
        kind: "prior" or "decoder".
        config: the trainer's configuration, or its JSON file; None takes the one in the file, or
            <kind>_config.json next to it.
        version: of DALLE2-pytorch; None takes the one in the file.
        ema: whether the average over the steps is taken (True) or the last weights (False); None takes the
            average if the file has one.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file or the configuration is damaged, has no such weights, or asks for code.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix not in SUFFIXES:
        raise CheckpointError(f"{file}: expected a file of {', '.join(SUFFIXES)}")
    content = read_tensors(file) if file.suffix == ".safetensors" else read_torch(file, ignored=_IGNORED)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: expected a dict, got {type(content).__name__}")
    tensors, averaged = _choose(content, ema, file)
    tensors = {name: value for name, value in tensors.items() if not name.startswith("clip.")}
    wanted = "net." if kind == "prior" else "unets."
    if not any(name.startswith(wanted) for name in tensors):
        came = ", ".join([*tensors][:3]) or "no tensor"
        raise CheckpointError(f"{file}: expected a {kind}, with tensors {wanted}..., got {came}")
    return Stored(
        file, tensors, _version(version or content.get("version"), file),
        _config(file, kind, content.get("config") if config is None else config), averaged,
    )  # fmt: skip


def _choose(content: Mapping, ema: bool | None, file: Path) -> tuple[dict[str, Tensor], bool]:
    """The module's tensors: the averaged ones, or the last."""
    model = content.get("model", content)
    averaged = {}
    if isinstance(content.get("ema_model"), Mapping):  # of a prior
        averaged = dict(content["ema_model"])
    elif isinstance(content.get("ema"), Mapping):  # of a decoder's U-Nets
        for name, value in content["ema"].items():
            if (found := re.match(r"(\d+)\.ema_model\.(.*)", name)) is not None:
                averaged[f"unets.{found[1]}.{found[2]}"] = value
    if ema and not averaged:
        raise CheckpointError(f"{file}: ema=True: the file holds no average over the steps")
    if not isinstance(model, Mapping):
        raise CheckpointError(f'{file}: expected a state_dict as "model", got {type(model).__name__}')
    chosen = dict(model)
    if averaged and ema is not False:
        kept = {name: value for name, value in chosen.items() if not name.startswith(("net.", "unets."))}
        chosen = kept | averaged
    if strange := [str(name) for name, value in chosen.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{file}: expected tensors only, got something else in {listed(strange)}")
    return chosen, bool(averaged) and ema is not False


def _version(value: Any, file: Path) -> tuple[int, int, int] | None:
    """The numbers of a version: of a string, or of the object that a prior's trainer pickles."""
    if isinstance(value, Ignored):
        # packaging.version.Version, whose state is a tuple, or of older releases a dict with a named tuple.
        state = value.state
        if isinstance(state, Mapping) and isinstance(state.get("_version"), Ignored):
            state = state["_version"].arguments
        if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[1], tuple):
            return None
        value = ".".join(map(str, state[1]))
    if value is None:
        return None
    if not isinstance(value, str) or (found := _NUMBER.match(value)) is None:
        raise CheckpointError(
            f"{file}: version: expected that of DALLE2-pytorch, such as 1.11.0, got {value!r}"
        )
    return int(found[1]), int(found[2]), int(found[3])


def _config(file: Path, kind: str, given: Any) -> dict[str, Any]:
    """The part of the trainer's configuration for this kind of module."""
    source = file
    if given is None:
        source = file.with_name(f"{kind}_config.json")
        if not source.is_file():
            return {}
        given = source
    if isinstance(given, (str, PathLike)):
        source = Path(given).expanduser()
        given = read_json(source)
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{source}: config: expected a dict, got {type(given).__name__}")
    given = given.get(kind, given)
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{source}: {kind}: expected a dict, got {type(given).__name__}")
    return dict(given)
