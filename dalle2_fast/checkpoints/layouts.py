"""Which layout a checkpoint has. A new layout is a module in formats/ with a reader, and a line in LAYOUTS.

A reader takes a folder and the parts that are wanted. It returns a Checkpoint, or None if the folder has
another layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from dalle2_fast.checkpoints.checkpoint import PARTS, Checkpoint
from dalle2_fast.checkpoints.errors import contents
from dalle2_fast.checkpoints.folder import CONFIG_FILE, embedded_path, load_config, load_folder
from dalle2_fast.checkpoints.formats.diffusers import read_network, read_pipeline
from dalle2_fast.checkpoints.formats.karlo import read_originals
from dalle2_fast.checkpoints.hub import locate

Reader = Callable[[Path, Collection[str]], Checkpoint | None]


def read_folder(folder: Path, parts: Collection[str]) -> Checkpoint | None:
    """A folder of dalle2_fast; of a single network's folder, all of it is read."""
    if not (folder / CONFIG_FILE).is_file():
        return None
    return Checkpoint(folder, *load_folder(folder, None if {*parts} == {*PARTS} else parts))


LAYOUTS: dict[str, Reader] = {  # what an error message calls the layout -> its reader; the first one reads
    "a diffusers UnCLIPPipeline (model_index.json)": read_pipeline,
    "a diffusers PriorTransformer (config.json with _class_name)": read_network,
    "a dalle2_fast checkpoint (config.json, model.safetensors)": read_folder,
    "Karlo's original .ckpt files": read_originals,
}


def open_checkpoint(
    path: str | os.PathLike | None = None,
    parts: Collection[str] = PARTS,
    *,
    revision: str | None = None,
) -> Checkpoint:
    """Read a checkpoint in any of the known layouts.

    Args:
        path: a folder, an id of the Hugging Face hub, or None for the checkpoint that is installed with the
            package.
        parts: of a layout with several networks, those that are read.
        revision: a branch, tag or commit, for an id of the hub.

    Returns:
        The config and the weights of these parts, in the names of dalle2_fast.

    Raises:
        FileNotFoundError: something is missing; the message says what was expected and what is there.
        CheckpointError: a file is damaged, unknown, or holds more than plain weights. Nothing in a file is
            ever run.

    Example:
        >>> checkpoint = open_checkpoint(parts=["prior"])
        >>> checkpoint.config["model"], {name.partition(".")[0] for name in checkpoint.tensors}
        ('DALLE2', {'prior'})
    """
    folder = embedded_path() if path is None else locate(path, revision)
    if not folder.is_dir():
        load_config(folder)  # raises: there is no such folder, or it is a file
    for read in LAYOUTS.values():
        if (checkpoint := read(folder, parts)) is not None:
            return checkpoint
    *layouts, last = LAYOUTS
    raise FileNotFoundError(
        f"{folder}: no checkpoint: {CONFIG_FILE} is missing; expected {', '.join(layouts)} or {last}, "
        f"got {contents(folder)}"
    )
