"""A pipeline as a checkpoint folder: config.json and model.safetensors."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dalle2_fast.checkpoints import (
    CheckpointError,
    construct,
    join_states,
    open_checkpoint,
    save_folder,
)
from dalle2_fast.data.text.tokenizer import tokenizer_from_config
from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.models.decoder.model import Decoder
from dalle2_fast.models.prior.autoregressive import ARPrior
from dalle2_fast.models.prior.diffusion import DiffusionPrior
from dalle2_fast.models.upsampler.model import Upsampler
from dalle2_fast.pipeline.device import choose_device, choose_dtype
from dalle2_fast.pipeline.parts import PARTS, UPSAMPLERS

if TYPE_CHECKING:
    from dalle2_fast.pipeline.dalle2 import DALLE2

PRIORS = {"DiffusionPrior": DiffusionPrior, "ARPrior": ARPrior, None: None}  # config["prior_class"]


def save_pipeline(pipe: DALLE2, path: str | PathLike, dtype: torch.dtype | None) -> Path:
    """See DALLE2.save_pretrained."""
    parts = {name: getattr(pipe, name) for name in PARTS}
    config = {
        "model": "DALLE2",
        "prior_class": None if pipe.prior is None else type(pipe.prior).__name__,
        **{name: None if part is None else part.config for name, part in parts.items()},
        "tokenizer": pipe.tokenizer.to_config(),
        "sampling": pipe.sampling,
        "metadata": pipe.metadata,
    }
    return save_folder(path, config, join_states(parts), dtype=dtype)


def load_pipeline(
    kind: type[DALLE2],
    path: str | PathLike | None,
    device: torch.device | str,
    dtype: torch.dtype | str,
    revision: str | None,
) -> DALLE2:
    """See DALLE2.from_pretrained; `kind` is the class to construct."""
    if not isinstance(device, torch.device):  # one that a program made itself may be of another type
        device = choose_device(device, argument="device")
    dtype = choose_dtype(dtype, device, "dtype")
    checkpoint = open_checkpoint(path, revision=revision)
    path, config = checkpoint.path, checkpoint.config
    if config.get("model") != "DALLE2":
        raise CheckpointError(f"{path}: expected a checkpoint of model 'DALLE2', got {config.get('model')!r}")
    prior = config.get("prior_class", "DiffusionPrior")  # older checkpoints do not name it
    if prior not in PRIORS:
        raise CheckpointError(
            f"{path}: config.json: prior_class: expected DiffusionPrior or ARPrior, got {prior!r}"
        )
    kinds = {"clip": CLIP, "decoder": Decoder} | ({} if prior is None else {"prior": PRIORS[prior]})
    kinds |= {name: Upsampler for name in UPSAMPLERS if config.get(name) is not None}
    checkpoint.reject_leftovers(kinds)
    tokenizer = construct(tokenizer_from_config, config, "tokenizer", path)
    parts = {"prior": None} | checkpoint.make(kinds, device, dtype)
    try:
        pipe = kind(
            **parts, tokenizer=tokenizer, sampling=config.get("sampling"), metadata=config.get("metadata")
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: config.json: {error}") from error
    return pipe.eval()
