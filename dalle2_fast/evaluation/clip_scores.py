"""What CLIP distinguishes: N-way retrieval, and 2-way tests against captions that one edit makes false."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.captions import compose, draw_phrasing, stated
from dalle2_fast.data.synthetic.negatives import NEGATIVE_KINDS, contradicts, hard_negatives
from dalle2_fast.data.synthetic.rendering import render
from dalle2_fast.data.synthetic.scenes import Scenes
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.evaluation.scores import Tally

# Sums over the edits that test the same ability.
GROUPS = {"binding": ("swap_colors", "swap_shapes"), "relation": ("change_relation", "swap_objects")}

EncodeText = Callable[[Tensor], Tensor]  # scene tokens int64 [n, 36] -> unit vectors [n, D]
EncodeImage = Callable[[Tensor], Tensor]  # images [n, 3, R, R] in [0, 1] -> unit vectors [n, D]


@torch.no_grad()
def score_clip(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    scenes: Scenes,  # n of them, on the CPU
    *,
    world: World,
    split: str,
    resolution: int,
    generator: torch.Generator,
) -> dict[str, dict[str, Tally]]:
    """Retrieval and 2-way tests on renders of `scenes`.

    Args:
        encode_image: the image tower.
        encode_text: the text tower.
        scenes: of `world` and `split`.
        world: of the edits.
        split: of the scenes.
        resolution: of the renders, in pixels.
        generator: chooses how captions are phrased and what is edited.

    Returns:
        {"retrieval": {name: Tally}, "two_way": {edit: Tally}}.
        retrieval: of all n captions, is the one nearest to the image true of it? (A caption that omits
        something, or that two scenes share, may be true of several images.) "full": the captions state
        everything; "natural": they omit attributes at random.
        two_way: is the true caption nearer than the same one after an edit that makes it false? It has every
        edit of data.synthetic.negatives that the world allows, and the sums GROUPS. Chance is one half.
    """
    n = len(scenes["kind"])
    image = encode_image(render(scenes, resolution))
    retrieval = {}
    for name, drop in (("full", 0.0), ("natural", 1.0)):
        phrasing = draw_phrasing(n, generator, drop=drop)
        says = stated(scenes, phrasing)
        nearest = (image @ encode_text(compose(scenes, phrasing)).T).argmax(1)
        claimed = {key: value[nearest] for key, value in scenes.items()}
        wrong = contradicts(scenes, claimed, {key: value[nearest] for key, value in says.items()})
        retrieval[name] = Tally(int((~wrong).sum()), n)

    two_way = {}
    phrasing = draw_phrasing(n, generator)
    true = (image * encode_text(compose(scenes, phrasing))).sum(-1)
    for kind in NEGATIVE_KINDS:
        edited, hard = hard_negatives(
            # Scenes without held-out pairs are tested with captions without them: the pair would give away
            # which caption is false.
            scenes, generator, kind, phrasing=phrasing, split="iid" if split == "iid" else "all", world=world
        )  # fmt: skip
        rows = hard.nonzero()[:, 0]
        if not len(rows):
            continue
        tokens = compose({key: value[rows] for key, value in edited.items()}, phrasing.rows(rows))
        wins = true[rows] > (image[rows] * encode_text(tokens)).sum(-1)
        two_way[kind] = Tally(int(wins.sum()), len(rows))
    for name, kinds in GROUPS.items():
        parts = [two_way[kind] for kind in kinds if kind in two_way]
        if parts:
            two_way[name] = Tally(sum(part.right for part in parts), sum(part.of for part in parts))
    return {"retrieval": retrieval, "two_way": two_way}
