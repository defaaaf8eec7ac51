"""Rules that make our tensors from those of another project, and errors that name what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError, mismatches


@dataclass(frozen=True)
class MadeFrom:
    """How one of our tensors is made.

    Args:
        names: those of their tensors that it is made from.
        make: takes these tensors, in order, and returns ours.
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


Rules = dict[str, MadeFrom]  # our name -> how it is made


def renamed(ours: str, theirs: str, make: Callable[..., Tensor] | None = None) -> Rules:
    """Rules for the weight and bias of one layer, with `make` applied to each.

    Example:
        >>> renamed("proj_in", "fc1")["proj_in.bias"].names
        ('fc1.bias',)
    """
    kinds = ("weight", "bias")
    if make is None:
        return {f"{ours}.{kind}": MadeFrom((f"{theirs}.{kind}",)) for kind in kinds}
    return {f"{ours}.{kind}": MadeFrom((f"{theirs}.{kind}",), make) for kind in kinds}


def stacked(ours: str, *theirs: str) -> Rules:
    """Rules for the weight and bias of one layer that concatenates the rows of several of theirs."""
    return {
        f"{ours}.{kind}": MadeFrom(tuple(f"{name}.{kind}" for name in theirs), stack_rows)
        for kind in ("weight", "bias")
    }


def stack_rows(*rows: Tensor) -> Tensor:
    """Concatenate tensors along their first axis."""
    return torch.cat(rows)


def parts_first(parts: int, head_dim: int) -> Callable[[Tensor], Tensor]:
    """Reorder the rows of a fused projection: [heads, parts, head_dim] -> ours, [parts, heads, head_dim].

    The kernel axis of a convolution that is a linear layer is dropped.

    Args:
        parts: fused projections, such as 3 for queries, keys and values.
        head_dim: the width of a head.

    Example:
        >>> parts_first(parts=2, head_dim=1)(torch.tensor([10, 11, 20, 21]))
        tensor([10, 20, 11, 21])
    """

    def reorder(rows: Tensor) -> Tensor:
        rows = rows.flatten(1) if rows.dim() > 1 else rows
        return rows.unflatten(0, (-1, parts, head_dim)).transpose(0, 1).flatten(0, 2)

    return reorder


def without_kernel_axis(weight: Tensor) -> Tensor:
    """The weight [out, in, 1] of a convolution that is a linear layer -> [out, in]; a bias stays."""
    return weight.flatten(1) if weight.dim() > 1 else weight


def prefixed(prefix: str, rules: Rules, theirs: str = "") -> Rules:
    """The same rules for names that begin with `prefix` in ours and with `theirs` in theirs."""
    return {
        prefix + ours: MadeFrom(tuple(theirs + name for name in source.names), source.make)
        for ours, source in rules.items()
    }


def translate(tensors: Mapping[str, Tensor], rules: Rules, source: object) -> dict[str, Tensor]:
    """Make our tensors from theirs.

    Args:
        tensors: their name -> tensor.
        rules: one for each of our tensors.
        source: where theirs were read; error messages begin with it.

    Returns:
        Our name -> tensor.

    Raises:
        CheckpointError: tensors are missing or left over, or have a shape from which ours cannot be made. The
            message uses their names.

    Example:
        >>> translate({"fc.weight": torch.ones(1)}, {"proj.weight": MadeFrom(("fc.weight",))}, "x.bin")
        {'proj.weight': tensor([1.])}
    """
    used = sorted({name for source in rules.values() for name in source.names})
    if problems := mismatches(dict.fromkeys(used), dict(sorted(tensors.items()))):
        raise CheckpointError(f"{source}: the weights do not fit: " + "; ".join(problems))
    made = {}
    for ours, source in rules.items():
        try:
            made[ours] = source.make(*(tensors[name] for name in source.names))
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in source.names)
            raise CheckpointError(f"{source}: no {ours} can be made of {shapes} ({error})") from None
    return made


def count_numbers(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix` in the names.

    Example:
        >>> count_numbers(["blocks.0.weight", "blocks.0.bias", "blocks.1.weight"], "blocks.")
        2
    """
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
