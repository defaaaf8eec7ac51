"""The optimisers of a stage and their groups of parameters; recipes.Optimisation has the settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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


def by_kind(group: dict) -> list[dict]:
    """A group of parameters as two: those that FSDP shards, and the others. An empty one is left out."""
    kinds = [[p for p in group["params"] if isinstance(p, DTensor) is kind] for kind in (True, False)]
    return [group | {"params": params} for params in kinds if params]


# Modules at the ends of a network: rows or columns of their matrices have different scales. Not for Muon.
ENDS = {"conv_in", "conv_out", "layout", "proj_in", "proj_out", "proj", "text_projection"}


def optimizer_groups(model: nn.Module, options: Optimisation) -> tuple[list[nn.Parameter], list[dict]]:
    """The parameters of Muon, and the groups of AdamW."""
    decayed, free = parameter_groups(model, options.weight_decay)
    hidden: list[nn.Parameter] = []
    if options.optimizer == "muon":
        ends = {id(p) for name, p in model.named_parameters() if ENDS & set(name.split("."))}
        hidden = [p for p in decayed["params"] if id(p) not in ends]
        decayed["params"] = [p for p in decayed["params"] if id(p) in ends]
    return hidden, [group for group in (decayed, free) if group["params"]]


def parameter_names(model: nn.Module, options: Optimisation) -> list[list[str]]:
    """The names of the parameters of each optimiser, in the order in which its state numbers them.

    It is the order of one process. Under FSDP the groups of `make_optimizers` are others.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden, groups = optimizer_groups(model, options)
    optimizers = [hidden, [parameter for group in groups for parameter in group["params"]]]
    return [[names[id(parameter)] for parameter in each] for each in optimizers if each]


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
    optimizers: list[torch.optim.Optimizer] = []
    hidden, groups = optimizer_groups(model, options)
    if hidden:
        optimizers.append(Muon(hidden, lr=learning_rate, weight_decay=options.weight_decay))
    # A fused optimiser takes shards or whole tensors: under FSDP, scalars have a group of their own.
    if groups := [part for group in groups for part in by_kind(group)]:
        optimizers.append(
            torch.optim.AdamW(
                groups, lr=learning_rate, betas=options.betas, fused=True, capturable=capturable
            )
        )
    if not optimizers:
        raise ValueError("model: expected a parameter that requires a gradient, got none")
    return optimizers
