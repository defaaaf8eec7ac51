"""Model FLOPs utilisation (MFU): what part of a GPU's peak the model's own arithmetic is.

    MFU = FLOPs of forward and backward per image * images per second / peak FLOP/s of all GPUs

The FLOPs are those of the plain model: what is computed again (activation checkpoints), the optimiser and the
frozen networks do not count.

Source: Chowdhery et al., "PaLM", 2204.02311, appendix B.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle2_fast.models.implementation import implementation
from dalle2_fast.training.parallel.gradient import rows_of
from dalle2_fast.training.stages.protocol import Stage
from dalle2_fast.training.trainer import Trainer

# Dense tensor-core FLOP/s in bfloat16 and float16 by a part of the GPU's name: NVIDIA's data sheets.
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The peak of a GPU in FLOP/s; None if it is not known, or the dtype is none of half precision.

    Args:
        name: of the GPU, as torch.cuda.get_device_name gives it.
        dtype: of autocast.

    Example:
        >>> peak_flops("NVIDIA H200", torch.bfloat16) / 1e12
        989.0
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    found = [part for part in PEAKS if part in name]
    return PEAKS[max(found, key=len)] if found else None


def flops_of_loss(stage: Stage, batch: dict, generator: torch.Generator) -> int:
    """The FLOPs of a loss and its gradient on this batch, without those of frozen networks.

    The backward pass has twice the products of the forward pass, and none of what is frozen.

    Args:
        stage: has the model and the loss.
        batch: as `stage.batch` makes it.
        generator: of the loss' random numbers; its state is restored.
    """
    state, counter = generator.get_state(), FlopCounterMode(display=False)
    try:
        with implementation(stage.model, "reference"), counter:  # the counter does not know our ops
            loss = stage.loss(batch, generator)
            forward = counter.get_total_flops()
            loss.backward()
    finally:
        stage.model.zero_grad(set_to_none=True)
        generator.set_state(state)
    return 3 * (counter.get_total_flops() - forward) // 2


def watch_utilisation(trainer: Trainer) -> None:
    """Let the log of a trainer have the column mfu, where the peak of its GPU is known.

    FSDP is left out, because its parameters are whole only in a step.
    """
    device, is_sharded = trainer.device, trainer.gradient.execution.parallel == "fsdp"
    world_size = trainer.processes.world_size
    if device.type != "cuda" or (is_sharded and world_size > 1):
        return
    peak = peak_flops(torch.cuda.get_device_name(device), trainer.dtype)
    if peak is None:
        return
    stage, batch = trainer.stage, trainer.stage.batch(trainer.state.step)
    rows = min(2, len(batch["tokens"]))
    flops = flops_of_loss(stage, rows_of(batch, 0, rows), torch.Generator(device))
    images = rows * trainer.options.batch_size / stage.scenes_per_batch()
    trainer.flops_per_image, trainer.peak_flops = flops / images, peak * world_size
