"""Saving and loading weights: the library's own folder format, and naming what does not fit."""

from dalle2_fast.checkpoints.folder import (
    FORMAT_VERSION,
    CheckpointError,
    construct,
    embedded_path,
    load_config,
    load_folder,
    save_folder,
)
from dalle2_fast.checkpoints.weights import join_states, load_state, reject_leftovers

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "construct",
    "embedded_path",
    "join_states",
    "load_config",
    "load_folder",
    "load_state",
    "reject_leftovers",
    "save_folder",
]
