"""From the names in somebody else's file to ours: rules, and naming what was missing or left over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError, mismatches


@dataclass(frozen=True)
class MadeFrom:
    """One of our tensors: which of theirs it is made of, and how."""

    names: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


Rules = dict[str, MadeFrom]  # our name -> where it comes from


def renamed(ours: str, theirs: str, make: Callable[..., Tensor] | None = None) -> Rules:
    """Weight and bias of one layer, `make` applied to each."""
    kinds = ("weight", "bias")
    if make is None:
        return {f"{ours}.{kind}": MadeFrom((f"{theirs}.{kind}",)) for kind in kinds}
    return {f"{ours}.{kind}": MadeFrom((f"{theirs}.{kind}",), make) for kind in kinds}


def stacked(ours: str, *theirs: str) -> Rules:
    """Weight and bias of one layer, the rows of theirs below each other."""
    return {
        f"{ours}.{kind}": MadeFrom(tuple(f"{name}.{kind}" for name in theirs), stack_rows)
        for kind in ("weight", "bias")
    }


def stack_rows(*rows: Tensor) -> Tensor:
    return torch.cat(rows)


def parts_first(parts: int, head_dim: int) -> Callable[[Tensor], Tensor]:
    """Rows [heads, parts, head_dim] of a fused projection -> [parts, heads, head_dim], as ours are. A
    trailing kernel of one, of a convolution that is a linear layer, is dropped."""

    def reorder(rows: Tensor) -> Tensor:
        rows = rows.flatten(1) if rows.dim() > 1 else rows
        return rows.unflatten(0, (-1, parts, head_dim)).transpose(0, 1).flatten(0, 2)

    return reorder


def without_kernel_axis(weight: Tensor) -> Tensor:
    """[out, in, 1] of a convolution that is a linear layer -> [out, in]."""
    return weight.flatten(1) if weight.dim() > 1 else weight


def prefixed(prefix: str, rules: Rules, theirs: str = "") -> Rules:
    """The same rules for names that begin with `prefix` here and with `theirs` there."""
    return {
        prefix + ours: MadeFrom(tuple(theirs + name for name in source.names), source.make)
        for ours, source in rules.items()
    }


def translate(tensors: Mapping[str, Tensor], rules: Rules, source: object) -> dict[str, Tensor]:
    """Our tensors made of theirs. CheckpointError names, in their words, what is missing or left over, and
    what has a shape from which ours cannot be made."""
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
    """How many different numbers (or words) follow on `prefix` in the names, up to the next dot."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
