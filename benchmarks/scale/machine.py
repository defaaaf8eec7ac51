"""The machines of the simulator: data sheets, and the assumptions that no data sheet states.

Nothing here was measured. Every number has its source next to it, or is called an assumption.
"""

from __future__ import annotations

from typing import NamedTuple


class GPU(NamedTuple):
    """One GPU of a node of eight.

    Args:
        name: of the product.
        flops: bfloat16 tensor cores, dense, FLOP/s.
        memory: bytes.
        memory_rate: bytes/s of its memory.
    """

    name: str
    flops: float
    memory: float
    memory_rate: float


# NVIDIA's data sheets of H100 SXM and H200 SXM; the data sheets' 1,979 TFLOP/s are with sparsity.
H100 = GPU("H100 SXM", 989e12, 80e9, 3.35e12)
H200 = GPU("H200 SXM", 989e12, 141e9, 4.8e12)

NODE = 8  # GPUs
NVLINK = 450e9  # bytes/s and direction of a GPU: fourth generation, 900 GB/s both ways
FABRIC = 50e9  # bytes/s and direction of a GPU: one port of 400 Gb/s InfiniBand for each GPU (DGX H100)
HOST_LINK = 50e9  # bytes/s from a GPU to its host. Assumption: 0.8 of PCIe 5.0 x16, which has 63e9
WRITE_RATE = 2e9  # bytes/s of a node to the file system. Assumption
HOP = 10e-6  # seconds of one neighbour exchange without any bytes. Assumption

MFU = 0.4  # share of the peak that training reaches. Assumption
FREE = 0.9  # share of the memory that weights, states and activations may fill. Assumption

WORLD_SIZES = (8, 32, 128, 512, 1024)


def nodes(world: int) -> int:
    """Nodes that `world` GPUs fill."""
    return max(1, world // NODE)
