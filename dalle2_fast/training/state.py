"""The folder of one training stage: what lies in it, written so that a kill never leaves half a file.

    state.pt            model, EMA, optimiser, step, elapsed seconds (read back with weights_only=True)
    state.previous.pt   the state saved before it
    model.safetensors   the finished stage's averaged weights, its configuration in the header
    log.jsonl           one JSON object a line
    samples/            picture grids
"""
from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor


class TrainingError(RuntimeError):
    """Something the user can put right; its text is the one line shown on the command line (exit code 2)."""


def write_beside(path: Path, write: Callable[[BinaryIO], Any], keep: Path | None = None) -> None:
    """Write to `path`.partial, flush to the disk, then rename: readers see the old file or the new, no half.

    keep: where the old file goes; without it the old file is replaced.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def save_weights(path: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """One safetensors file with the configuration (JSON) in its header, so that weights and configuration
    cannot part."""
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    data = safetensors.torch.save(tensors, metadata={"config": json.dumps(config)})
    write_beside(path, lambda file: file.write(data))


def load_weights(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read back what `save_weights` wrote: (config, tensors)."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
            return config, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path}: not a readable weights file of this library ({error})") from error


class StageFolder:
    """Reads and writes the files of one stage under `path`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.state_path = self.path / "state.pt"
        self.previous_path = self.path / "state.previous.pt"
        self.weights_path = self.path / "model.safetensors"
        self.log_path = self.path / "log.jsonl"

    def prepare(self) -> None:
        """Create the folder and clear leftovers of a killed write; an unwritable place is found now, not an
        hour later."""
        try:
            (self.path / "samples").mkdir(parents=True, exist_ok=True)
            for leftover in self.path.rglob("*.partial"):
                leftover.unlink()
            probe = self.path / "probe.partial"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise TrainingError(f"--out: cannot write to {self.path}: {error.strerror or error}") from error

    def has_state(self) -> bool:
        return self.state_path.exists() or self.previous_path.exists()

    def save_state(self, state: dict) -> None:
        """Write the state; the present one becomes the previous. At every instant one whole state exists."""
        buffer = io.BytesIO()  # in memory first: torch's own file writer may abort the process on a full disk
        torch.save(state, buffer)
        write_beside(self.state_path, lambda file: file.write(buffer.getbuffer()), keep=self.previous_path)

    def load_state(self, device: torch.device) -> tuple[dict, Path]:
        """The newest whole state and its file. A damaged one is an error that names the previous one."""
        path = self.state_path if self.state_path.exists() else self.previous_path
        try:
            return torch.load(path, map_location=device, weights_only=True), path
        except Exception as error:
            advice = f"; delete it to resume {self.previous_path.name}" if path == self.state_path else ""
            raise TrainingError(f"{path}: damaged training state ({type(error).__name__}){advice}") from error

    def append_log(self, rows: list[dict]) -> None:
        """Append one JSON line a row and flush."""
        try:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            raise TrainingError(f"cannot write {self.log_path}: {error.strerror or error}") from error

    def trim_log(self, step: int) -> None:
        """Drop the lines after `step`: steps that a kill undid would otherwise appear twice."""
        if not self.log_path.exists():
            return
        kept = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # half a line, cut by the kill
                continue
        write_beside(self.log_path, lambda file: file.write("".join(kept).encode()))

    def save_picture(self, name: str, images: Tensor, columns: int) -> None:
        """images: float [N, 3, H, W] in [0, 1] -> samples/name.png, `columns` in a row."""
        from PIL import Image

        count, _, height, width = images.shape
        rows = -(-count // columns)
        sheet = torch.ones(3, rows * (height + 2), columns * (width + 2))
        for index, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
            top, left = (index // columns) * (height + 2), (index % columns) * (width + 2)
            sheet[:, top : top + height, left : left + width] = image
        pixels = (sheet.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        picture = io.BytesIO()
        Image.fromarray(pixels).save(picture, format="PNG")
        write_beside(self.path / "samples" / name, lambda file: file.write(picture.getvalue()))
