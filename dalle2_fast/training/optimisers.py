"""The optimisers of a stage and their groups of parameters; recipes.Optimisation has the settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle2_fast.training.muon import Muon
from dalle2_fast.training.recipes import Optimisation


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, with and without weight decay: norms, biases, scalars and embeddings do not decay."""
    tables = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = (
                parameter.ndim >= 2
                and id(parameter) not in tables
                and "embedding" not in name.rsplit(".", 1)[-1]
            )
            (decayed if plain else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


# Modules at the ends of a network: rows or columns of their matrices have different scales. Not for Muon.
ENDS = {"conv_in", "conv_out", "layout", "proj_in", "proj_out", "proj", "text_projection"}


def make_optimizers(
    model: nn.Module, options: Optimisation, rate: Tensor | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest.

    Args:
        model: its parameters are optimised.
        options: the optimiser and its settings.
        rate: a scalar from which every step reads the learning rate, so that a CUDA graph may contain it;
            None where the learning rate is a number.
    """
    learning_rate = options.learning_rate if rate is None else rate
    capturable = rate is not None and rate.device.type == "cuda"
    decayed, free = parameter_groups(model, options.weight_decay)
    optimizers: list[torch.optim.Optimizer] = []
    if options.optimizer == "muon":
        ends = {id(p) for name, p in model.named_parameters() if ENDS & set(name.split("."))}
        hidden = [p for p in decayed["params"] if id(p) not in ends]
        decayed["params"] = [p for p in decayed["params"] if id(p) in ends]
        if hidden:
            optimizers.append(Muon(hidden, lr=learning_rate, weight_decay=options.weight_decay))
    if groups := [group for group in (decayed, free) if group["params"]]:
        optimizers.append(
            torch.optim.AdamW(
                groups, lr=learning_rate, betas=options.betas, fused=True, capturable=capturable
            )
        )
    if not optimizers:
        raise ValueError("model: expected a parameter that requires a gradient, got none")
    return optimizers
