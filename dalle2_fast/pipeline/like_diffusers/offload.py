"""CPU offload: each network is on the GPU only while its stage runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from dalle2_fast.pipeline.compilation.graphs import release_graphs
from dalle2_fast.pipeline.device import choose_device

if TYPE_CHECKING:
    from dalle2_fast.pipeline.dalle2 import DALLE2


def enable_model_cpu_offload(pipe: DALLE2, device: torch.device | str = "cuda") -> DALLE2:
    """Keep the networks in the CPU's memory, and move each to a GPU while its stage runs.

    The GPU then holds the largest network alone and not all of them; each call pays for the copies. Results
    are those of the same pipeline on that GPU. Steps run without CUDA graphs, because a network that moves
    has new addresses. `pipe.to(device)` ends it.

    Args:
        device: a GPU: "cuda", "cuda:N" or "mps", or a torch.device.

    Returns:
        The same pipeline; its `device` is the GPU.

    Raises:
        TypeError, ValueError: no GPU of this machine.

    Example::

        pipe = DALLE2.from_pretrained("karlo/", device="cpu", dtype="fp16").enable_model_cpu_offload()
    """
    offload_to(pipe, choose_device(device, ("cuda", "mps"), "device"))
    return pipe


def offload_to(pipe: DALLE2, device: torch.device) -> None:
    """As `enable_model_cpu_offload`, to any device."""
    release_graphs(pipe)
    pipe.to("cpu")
    pipe._offload_device = device


@contextmanager
def resident(pipe: DALLE2, part: str) -> Iterator[None]:
    """`with resident(pipe, "decoder"):` a network is where its stage runs; without offload it always is."""
    device = pipe._offload_device
    if device is None:
        yield
        return
    network = getattr(pipe, part)
    network.to(device)
    try:
        yield
    finally:
        network.to("cpu")
