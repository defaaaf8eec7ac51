"""Models of stages whose training is finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.weights import load_weights


def load_finished(
    out: Path, name: str, classes: Sequence[type[nn.Module]], device: torch.device | str = "cpu"
) -> nn.Module:
    """The finished model of stage `name`: averaged weights, eval mode, no gradients.

    Args:
        out: folder of the run.
        name: of the stage.
        classes: that the model may have; the first one if the file names none.
        device: of the model.

    Raises:
        TrainingError: the stage is not finished, or its file does not hold such a model.
    """
    path = Path(out) / name / "model.safetensors"
    if not path.exists():
        raise TrainingError(f"{path} not found: first train it: dalle2-fast train {name} --out {out}")
    config, tensors = load_weights(path)
    known = {each.__name__: each for each in classes}
    chosen = config.get("class", classes[0].__name__)
    if chosen not in known:
        raise TrainingError(f"{path}: holds an unknown class of model, {chosen!r}")
    model = known[chosen](**config["model"])
    model.load_state_dict(tensors)
    return model.to(device).eval().requires_grad_(False)
