"""The folder of one training stage. A kill never leaves half of a file there.

    state.pt            model, EMA, optimisers, step, elapsed seconds (loaded with weights_only=True)
    state.previous.pt   the state saved before it
    checkpoints/        states of many processes in place of these two, see parallel/checkpoints.py
    model.safetensors   averaged weights of the finished stage, with the configuration in the header
    log.jsonl           one JSON object per line
    samples/            image grids
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from dalle2_fast.checkpoints.atomic import SUFFIX, atomic_write
from dalle2_fast.data.images import image_grid, to_pil
from dalle2_fast.training.errors import TrainingError


def write_file(path: Path, data: bytes | memoryview, *, backup: Path | None = None) -> None:
    """Replace the file `path`; a reader sees the old file or the new one.

    Args:
        path: of the file; its folder must exist.
        data: the whole content. It is made in memory, because torch's writer of files may abort the process
            on a full disk.
        backup: where the old file is kept. None deletes it.

    Raises:
        TrainingError: the file cannot be written.
    """
    try:
        with atomic_write(path, backup=backup) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {reason(error)}") from error


def reason(error: OSError) -> str:
    """The message of the operating system alone, such as "No space left on device"."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # atomic_write chains it
    return cause.strerror or str(cause)


def find_damage(path: Path | io.BytesIO) -> str | None:
    """What is wrong with an archive that torch.save wrote: truncated, or a checksum that does not hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        return str(error)
    return None if wrong is None else f"the checksum of {wrong} does not hold"


def delete_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed commands in `folder`, but not in its sub-folders.

    Raises:
        TrainingError: they cannot be deleted.
    """
    try:
        for leftover in folder.glob(f"*{SUFFIX}"):
            leftover.unlink()
    except OSError as error:
        raise TrainingError(f"--out: cannot write to {folder}: {reason(error)}") from error


CHECKPOINT = re.compile(r"step-(\d{9})(?:\.(\d+))?")


def checkpoint_number(path: Path) -> tuple[int, int]:
    """The step of a state of many processes, and its number among the states of this step."""
    step, number = CHECKPOINT.fullmatch(path.name).groups()
    return int(step), int(number or 0)


class StageFolder:
    """Reads and writes the files of one stage.

    Args:
        path: of the folder, which `prepare` makes.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.state_path = self.path / "state.pt"
        self.previous_path = self.path / "state.previous.pt"
        self.weights_path = self.path / "model.safetensors"
        self.log_path = self.path / "log.jsonl"
        self.checkpoints_path = self.path / "checkpoints"

    def prepare(self) -> None:
        """Create the folder and delete temporary files of killed runs.

        Raises:
            TrainingError: nothing can be written there. It is found now and not an hour later.
        """
        try:
            (self.path / "samples").mkdir(parents=True, exist_ok=True)
            for leftover in list(self.path.rglob(f"*{SUFFIX}")):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink(missing_ok=True)
            probe = self.path / f"probe{SUFFIX}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise TrainingError(f"--out: cannot write to {self.path}: {reason(error)}") from error

    def has_state(self) -> bool:
        return self.state_path.exists() or self.previous_path.exists() or bool(self.checkpoints())

    def checkpoints(self) -> list[Path]:
        """The states of many processes that are complete, newest first."""
        names = [path for path in self.checkpoints_path.glob("step-*") if CHECKPOINT.fullmatch(path.name)]
        return sorted(names, key=checkpoint_number, reverse=True)

    def newest_path(self) -> Path:
        """The newest state of many processes, or the file of one."""
        return next(iter(self.checkpoints()), self.state_path)

    def has_begun(self) -> bool:
        """Whether there is a state, or the weights of a finished stage."""
        return self.has_state() or self.weights_path.exists()

    def save_state(self, state: dict) -> None:
        """Write the state and keep the previous one. At every instant one whole state exists."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(self.state_path, buffer.getbuffer(), backup=self.previous_path)

    def load_state(self) -> tuple[dict, Path]:
        """The newest state, on the CPU, and its file.

        It is not loaded to the device, which may have no room for a second copy of model and optimiser.

        Raises:
            TrainingError: the file is damaged, and the message names the previous one; or it cannot be loaded
                for another reason, such as too little memory, and the message does not call it damaged.
        """
        path = self.state_path if self.state_path.exists() else self.previous_path
        advice = f"; delete it to resume {self.previous_path.name}" if path == self.state_path else ""
        try:
            if (damage := find_damage(path)) is not None:  # torch compares no checksums
                raise TrainingError(f"{path}: damaged training state ({damage}){advice}")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise TrainingError(f"{path}: cannot be read: {reason(error)}") from error
        except (RuntimeError, MemoryError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
            if isinstance(error, TrainingError):
                raise
            what = " ".join(str(error).split()) or type(error).__name__
            raise TrainingError(f"{path}: cannot be loaded, but the file is whole: {what}") from error
        if not isinstance(state, dict):
            raise TrainingError(f"{path}: no training state of this library")
        return state, path

    def append_log(self, rows: list[dict]) -> None:
        """Append one line of JSON per row."""
        try:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            raise TrainingError(f"cannot write {self.log_path}: {reason(error)}") from error

    def trim_log(self, step: int) -> None:
        """Delete the lines after `step`: steps that a kill undid would otherwise appear twice."""
        if not self.log_path.exists():
            return
        kept = []
        for line in self.log_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # half of a line, cut by the kill
                continue
        write_file(self.log_path, "".join(kept).encode())

    def last_logged_step(self) -> int | None:
        """The step of the last line of the log; None without a log."""
        if not self.log_path.exists():
            return None
        lines = self.log_path.read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["step"] if lines else None

    def save_images(self, name: str, images: Tensor, columns: int) -> Path:
        """Write images, float [N, 3, H, W] in [0, 1], as a grid to samples/`name`; return its path."""
        png = io.BytesIO()
        image_grid(to_pil(images), columns=columns).save(png, format="PNG")
        path = self.path / "samples" / name
        write_file(path, png.getbuffer())
        return path
