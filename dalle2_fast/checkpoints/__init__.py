"""Saving and loading weights: our own folders, the layouts of others, and naming what does not fit."""

from dalle2_fast.checkpoints.checkpoint import Checkpoint
from dalle2_fast.checkpoints.errors import CheckpointError
from dalle2_fast.checkpoints.folder import (
    FORMAT_VERSION,
    construct,
    embedded_path,
    load_config,
    load_folder,
    save_folder,
)
from dalle2_fast.checkpoints.layouts import open_checkpoint
from dalle2_fast.checkpoints.pretrained import Pretrained
from dalle2_fast.checkpoints.weights import join_states, load_state, reject_leftovers

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "CheckpointError",
    "Pretrained",
    "construct",
    "embedded_path",
    "join_states",
    "load_config",
    "load_folder",
    "load_state",
    "open_checkpoint",
    "reject_leftovers",
    "save_folder",
]
