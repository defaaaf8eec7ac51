"""A row of the parity report, before and after it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.timing.provenance import commit, versions

Pairs = Iterator[tuple[Tensor, Tensor]]  # (ours, theirs)
NETWORK, PIPELINE = 1e-5, 1e-3  # bounds of |ours - theirs| / |theirs|, norms


@dataclass
class Row:
    network: str
    source: str  # the class of the other package
    needs: tuple[str, ...]  # packages that must be installed
    parameters: int  # of the published size
    measure: Callable[[], Pairs]
    bound: float = NETWORK


@dataclass
class Measured:
    network: str
    source: str
    parameters: int
    relative_difference: float  # |ours - theirs| / |theirs|, norms; the largest over all outputs
    largest_element: float  # max |ours - theirs| / max |theirs|
    bound: float
    date: str
    commit: str
    versions: dict[str, str | None] = field(default_factory=dict)


def on_meta(make: Callable[..., torch.nn.Module], **options) -> torch.nn.Module:
    with torch.device("meta"):
        return make(**options)


@torch.no_grad()
def measure(row: Row) -> Measured:
    """Raise RuntimeError, without a result, if an output is not finite, all zero or of another shape."""
    norm = element = 0.0
    for ours, theirs in row.measure():
        finite = torch.isfinite(ours).all() and torch.isfinite(theirs).all()
        if ours.shape != theirs.shape or not finite or not theirs.abs().max() > 0:
            raise RuntimeError(f"{row.network}: outputs {tuple(ours.shape)} and {tuple(theirs.shape)}")
        difference = (ours - theirs).double()
        norm = max(norm, (difference.norm() / theirs.double().norm()).item())
        element = max(element, (difference.abs().max() / theirs.abs().max()).item())
    distributions = {"open_clip": "open_clip_torch", "clip": "clip-anytorch"}
    packages = (distributions.get(name, name) for name in row.needs)
    return Measured(
        row.network, row.source, row.parameters, float(f"{norm:.3g}"), float(f"{element:.3g}"), row.bound,
        time.strftime("%Y-%m-%d"), commit(), versions(*packages),
    )  # fmt: skip
