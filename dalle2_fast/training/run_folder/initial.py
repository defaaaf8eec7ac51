"""The weights that a stage starts from, of another run or of a pipeline, and those that stay as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dalle2_fast.pipeline.dalle2 import DALLE2
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder, write_file
from dalle2_fast.training.run_folder.record import describe_tokenizer
from dalle2_fast.training.run_folder.tokenizer import FILE as TOKENIZER
from dalle2_fast.training.state import difference
from dalle2_fast.training.weights import load_weights, save_weights


def load_initial(model: nn.Module, path: Path, name: str | None = None) -> None:
    """Copy the weights of an earlier run of the same stage, or of a pipeline, into `model`.

    A fine level that the earlier U-Net did not have keeps its initial weights, and a line says so.

    Args:
        model: of the stage.
        path: a file of weights, or the folder of a pipeline.
        name: of the stage, for a pipeline.

    Raises:
        TrainingError: no such file or folder, or weights that do not fit.
    """
    if not path.exists():
        raise TrainingError(f"--init: {path} not found")
    if path.is_dir():
        network = getattr(_pipeline(path), name)
        if network is None:
            raise TrainingError(f"--init: {path} has no {name}")
        weights = network.state_dict()
        if type(network) is not type(model):
            expected, got = type(model).__name__, type(network).__name__
            raise TrainingError(f"--init: the {name} of {path}: expected a {expected}, got a {got}")
    else:
        weights = load_weights(path)[1]
    fine = {name: value for name, value in model.state_dict().items() if name.startswith("unet.fine.")}
    if fine and not fine.keys() & weights.keys():
        print(f"--init: {path} has no unet.fine, which starts from initial weights")
        weights |= fine
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # torch names the keys that are missing, left over or of another shape
        what = str(error)
        if path.is_dir():
            what = f"its {name}: {difference(model.config, network.config)}"
        raise TrainingError(f"--init: {path} does not fit this stage and preset: {what}") from error


def take_finished(
    path: Path | None, name: str, needed: Sequence[str], out: Path, *, on_shards: bool
) -> None:
    """Take networks that a stage uses as they are, and the tokenizer, from the pipeline that it starts from.

    Args:
        path: of --init; nothing is done unless it is a folder.
        name: of the stage.
        needed: the stages whose networks it uses. Those that the run has begun itself stay.
        out: folder of the run.
        on_shards: whether the run is on images of the user, and so keeps its tokenizer in a file.

    Raises:
        TrainingError: the folder is no pipeline, or the file cannot be written.
    """
    if path is None or not path.is_dir():
        return
    needed = [each for each in needed if not StageFolder(Path(out) / each).has_begun()]
    if not needed:
        return
    pipe = _pipeline(path)
    facts = {"tokenizer": describe_tokenizer(pipe.tokenizer), "init": str(path)}
    for each in needed:
        network = getattr(pipe, each)
        if network is None:
            raise TrainingError(f"--init: {path} has no {each}, which {name} needs")
        folder = StageFolder(Path(out) / each)
        folder.prepare()
        if each == "clip" and on_shards:
            write_file(Path(out) / TOKENIZER, json.dumps(pipe.tokenizer.to_config()).encode())
        save_weights(folder.weights_path, {"model": network.config} | facts, network.state_dict())
        print(f"{each}: that of {path} ({folder.weights_path})")


def _pipeline(path: Path) -> DALLE2:
    try:
        return DALLE2.from_pretrained(path, device="cpu", dtype="fp32")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"--init: {path}: expected a file of weights or a pipeline: {error}") from error


def freeze_weights(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Exclude from training every parameter whose name begins with one of `prefixes`.

    Raises:
        ValueError: a prefix with which no parameter begins, or nothing is left to train.
    """
    for prefix in prefixes:
        chosen = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not chosen:
            known = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
            raise ValueError(f"--freeze: no weight begins with {prefix!r}; they are {', '.join(known)}")
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze: {', '.join(prefixes)} leaves no weight to train")
