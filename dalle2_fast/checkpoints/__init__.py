"""Saving and loading checkpoints, in the layout of dalle2_fast and in those of other projects.

    folder                      a checkpoint folder of dalle2_fast: written and read
    layouts, formats/, hub      a checkpoint of any known layout, from a path or from the Hugging Face hub
    checkpoint, weights         what was read -> modules with their weights
    pretrained                  save_pretrained and from_pretrained of a single network
    tensor_files, torchscript   files -> tensors, without running anything in them
    atomic, errors              files that appear whole or not at all; CheckpointError and its phrases
"""

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
