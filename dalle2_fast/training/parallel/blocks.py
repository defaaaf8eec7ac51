"""The repeated blocks of the networks: what is computed again, compiled or sharded as one unit."""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dalle2_fast.models.clip.resnet import Bottleneck
from dalle2_fast.models.transformer import Block
from dalle2_fast.models.unet.blocks import AttentionBlock, ResBlock

PROGRAMS = 64  # of one class of blocks
BLOCKS = (Block, ResBlock, AttentionBlock, Bottleneck)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model in the order in which it has them; none contains another."""
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


def prepare_blocks(model: nn.Module, *, checkpoint_activations: bool, compile: bool) -> None:
    """Change how the blocks are called. Names and values of the weights stay as they are.

    Args:
        model: with the blocks.
        checkpoint_activations: keep the inputs of a block only, and compute its activations again in the
            backward pass.
        compile: compile the forward and the backward pass of each block with torch.compile. Blocks of one
            class and shape share the compiled code.
    """
    # The blocks of a U-Net have many shapes, and validation is compiled for itself. With torch's limit of
    # eight programs for one function the others would not be compiled. (Releases that cannot set it warn.)
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit = {"recompile_limit": PROGRAMS} if has_limit else {}
    for block in repeated_blocks(model):
        if compile:
            block.forward = torch.compile(block.forward, **limit)
        if checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
