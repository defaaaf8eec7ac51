"""Saving and loading checkpoints, in the layout of dalle2_fast and in those of other projects.

    folder                      a checkpoint folder of dalle2_fast: written and read
    layouts, formats/, hub      a checkpoint of any known layout, from a path or from the Hugging Face hub
    checkpoint, weights         what was read -> modules with their weights
    pretrained                  save_pretrained and from_pretrained of a single network
    tensor_files, torchscript   files -> tensors, without running anything in them
    atomic, errors              files that appear whole or not at all; CheckpointError and its phrases

Each name is imported on first use, so that `atomic` is there without torch.
"""

from typing import TYPE_CHECKING

from dalle2_fast._lazy import attach

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow `attach`
    from dalle2_fast.checkpoints.checkpoint import Checkpoint as Checkpoint
    from dalle2_fast.checkpoints.errors import CheckpointError as CheckpointError
    from dalle2_fast.checkpoints.folder import FORMAT_VERSION as FORMAT_VERSION
    from dalle2_fast.checkpoints.folder import construct as construct
    from dalle2_fast.checkpoints.folder import embedded_path as embedded_path
    from dalle2_fast.checkpoints.folder import load_config as load_config
    from dalle2_fast.checkpoints.folder import load_folder as load_folder
    from dalle2_fast.checkpoints.folder import save_folder as save_folder
    from dalle2_fast.checkpoints.layouts import open_checkpoint as open_checkpoint
    from dalle2_fast.checkpoints.pretrained import Pretrained as Pretrained
    from dalle2_fast.checkpoints.weights import join_states as join_states
    from dalle2_fast.checkpoints.weights import load_state as load_state
    from dalle2_fast.checkpoints.weights import reject_leftovers as reject_leftovers

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "dalle2_fast.checkpoints.checkpoint": ["Checkpoint"],
        "dalle2_fast.checkpoints.errors": ["CheckpointError"],
        "dalle2_fast.checkpoints.folder": [
            "FORMAT_VERSION", "construct", "embedded_path", "load_config", "load_folder", "save_folder",
        ],
        "dalle2_fast.checkpoints.layouts": ["open_checkpoint"],
        "dalle2_fast.checkpoints.pretrained": ["Pretrained"],
        "dalle2_fast.checkpoints.weights": ["join_states", "load_state", "reject_leftovers"],
    },
)  # fmt: skip
