"""Reports: the lines of a stage's log for TensorBoard and Weights & Biases, which are optional packages.

log.jsonl stays what a resumed run reads. A report begins anew at the step that is resumed, so that the steps
which a kill undid do not appear twice.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

REPORTS = ("tensorboard", "wandb")
_NOT_PLOTTED = ("step", "seconds", "samples")  # the horizontal axes


class Report(Protocol):
    """Where the lines of a log go."""

    def add(self, row: dict[str, Any], picture: Path | None) -> None:
        """One line of the log, and the PNG of a validation."""

    def close(self) -> None:
        """Write what is still in memory."""


def choose_reports(given: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the reports that a run writes.

    Args:
        given: some of REPORTS, or "none" alone. None is TensorBoard where it is installed.

    Raises:
        ValueError: another name, or "none" beside others.
        ImportError: a package that is asked for is not installed.

    Example:
        >>> choose_reports(["none"])
        ()
    """
    if given is None:
        return ("tensorboard",) if _is_installed("tensorboard") else ()
    if list(given) == ["none"]:
        return ()
    for name in given:
        if name not in REPORTS:
            raise ValueError(f"--report-to: expected none, or some of {', '.join(REPORTS)}, got {name!r}")
        if not _is_installed(name):
            raise ImportError(f"--report-to {name}: {name} is not installed: pip install {name}")
    return tuple(dict.fromkeys(given))


def open_reports(
    names: Sequence[str], folder: Path, *, stage: str, settings: dict[str, Any], step: int
) -> list[Report]:
    """The reports of a stage.

    Args:
        names: see `choose_reports`.
        folder: of the stage; TensorBoard writes into its sub-folder "tensorboard".
        stage: name of the stage.
        settings: of the stage, which the report states.
        step: the one at which the run begins or goes on.
    """
    kinds = {"tensorboard": TensorBoardReport, "wandb": WandbReport}
    return [kinds[name](folder, stage=stage, settings=settings, step=step) for name in names]


class TensorBoardReport:
    """Event files of TensorBoard in folder/tensorboard: `tensorboard --logdir RUN` shows all stages.

    Args:
        folder, stage, settings, step: see `open_reports`.
    """

    def __init__(self, folder: Path, *, stage: str, settings: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if step == 0:
            lines = (f"    {name}: {value}" for name, value in settings.items())
            self._writer.add_text(f"{stage}/settings", "\n".join(lines), 0)

    def add(self, row: dict[str, Any], picture: Path | None) -> None:
        for name, value in row.items():
            if name not in _NOT_PLOTTED:
                self._writer.add_scalar(name, value, row["step"])
        if picture is not None:
            self._writer.add_image("samples", _pixels(picture), row["step"], dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbReport:
    """A run of Weights & Biases, in the project that WANDB_PROJECT names, or else "dalle2-fast".

    The run's id lies in folder/wandb.txt, so that a resumed stage goes on in the same one.

    Args:
        folder, stage, settings, step: see `open_reports`.
    """

    def __init__(self, folder: Path, *, stage: str, settings: dict[str, Any], step: int) -> None:
        import os

        import wandb

        known = folder / "wandb.txt"
        identity = known.read_text().strip() if known.exists() and step else wandb.util.generate_id()
        known.write_text(identity + "\n")
        self._library = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dalle2-fast"), name=stage, dir=str(folder),
            config=settings, id=identity, resume="allow",
        )  # fmt: skip

    def add(self, row: dict[str, Any], picture: Path | None) -> None:
        values = {name: value for name, value in row.items() if name != "step"}
        if picture is not None:
            values["images"] = self._library.Image(str(picture))
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _pixels(picture: Path):
    """A PNG as uint8 [H, W, 3]."""
    import numpy as np
    from PIL import Image

    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))
