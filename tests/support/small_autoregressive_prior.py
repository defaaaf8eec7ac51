"""A small autoregressive prior with random weights, embeddings as CLIP's are spread, and captions for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dalle2_fast import ARPrior
from dalle2_fast.models.prior import ARPriorNetwork

EMBED, TEXT, LENGTH, KEPT, BUCKETS, DOTS = 24, 20, 9, 6, 16, 8
NET = dict(
    dim=32, depth=2, heads=4, embed_dim=EMBED, text_dim=TEXT, context_length=LENGTH, num_components=KEPT,
    num_buckets=BUCKETS, num_dot_buckets=DOTS,
)


def embeddings(rows: int = 400, seed: int = 1, width: int = EMBED) -> torch.Tensor:
    """Unit vectors around a common direction, with a few strong directions, as CLIP's are."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    basis = torch.linalg.qr(torch.randn(width, width, generator=fixed))[0]
    spread = torch.randn(rows, width, generator=generator) * 0.7 ** torch.arange(width)
    return F.normalize(2 * basis[0] + spread @ basis, dim=-1)


def small_net(**changes) -> ARPriorNetwork:
    torch.manual_seed(0)
    net = ARPriorNetwork(**NET | changes)
    with torch.no_grad():  # at its small initial weights the context would hardly show
        net.proj_out.weight.mul_(20)
        net.positional_embedding.mul_(20)
        net.code_embedding.weight.mul_(20)
        net.dot_embedding.weight.mul_(20)
    return net


def small_prior(fitted: bool = True, **options) -> ARPrior:
    prior = ARPrior(small_net(), **options)
    if fitted:
        prior.fit(embeddings(), embeddings(seed=2))
    return prior


def caption(rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 2, 9, 0, 7, 1])[:rows]
    return dict(
        text_embed=F.normalize(torch.randn(rows, EMBED, generator=generator), dim=-1),
        text_encodings=torch.randn(rows, LENGTH, TEXT, generator=generator),
        text_mask=torch.arange(LENGTH) < lengths[:, None],
    )


def conditions(row: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return row["text_embed"], row["text_encodings"], row["text_mask"]


def some_codes(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randint(BUCKETS, (rows, KEPT), generator=generator),
            torch.randint(DOTS + 1, (rows,), generator=generator))
