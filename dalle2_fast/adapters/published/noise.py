"""The noise schedule of a module of DALLE2-pytorch: the one whose betas are in its file."""

from __future__ import annotations

from typing import Any

import torch

from dalle2_fast.checkpoints import CheckpointError
from dalle2_fast.checkpoints.formats.dalle2_pytorch.stored import Stored
from dalle2_fast.diffusion import make_schedule

NAMES = ("cosine", "linear")


def schedule_of(stored: Stored, prefix: str, name: str | None, timesteps: int = 1000) -> dict[str, Any]:
    """The name of a schedule and its number of times.

    Args:
        stored: the file.
        prefix: of the names of the tensors of the noise.
        name: the schedule of the configuration, which counts if the file has no betas.
        timesteps: the number of times of the configuration.

    Returns:
        schedule and timesteps, as our classes take them.

    Raises:
        CheckpointError: the betas are those of no schedule that is known.
    """
    betas = stored.tensors.get(f"{prefix}betas")
    if betas is None or betas.is_meta:
        name = NAMES[0] if name is None else name
        if name not in NAMES:
            known = " or ".join(NAMES)
            raise CheckpointError(f"{stored.file}: beta_schedule: expected {known}, got {name!r}")
        return {"schedule": name, "timesteps": timesteps}
    for kind in NAMES:
        if betas.ndim == 1 and len(betas):
            expected = make_schedule(kind, len(betas)).betas
            if torch.allclose(betas.double(), expected, rtol=1e-2, atol=1e-6):
                return {"schedule": kind, "timesteps": len(betas)}
    raise CheckpointError(
        f"{stored.file}: {prefix}betas: expected those of a schedule {' or '.join(NAMES)}, got others"
    )
