"""Caption accuracy: which attributes that a caption states its image shows.

Every score is a `Tally`. What a caption does not state is not scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.scenes import CELL, MARGIN, Scenes
from dalle2_fast.data.synthetic.shapes import geometry
from dalle2_fast.data.synthetic.vocabulary import COUNT, KINDS
from dalle2_fast.evaluation.reading.table import Reading

ATTRIBUTES = (
    "count", "color", "shape", "binding", "fill", "size", "position", "relation", "background", "texture",
    "everything",
)  # fmt: skip
MATCHED = 3  # the largest number of objects of a scene that differ from one another


@dataclass(frozen=True)
class Tally:
    """`right` of `of` cases.

    Example:
        >>> Tally(1, 8).to_json()
        {'rate': 0.125, 'right': 1, 'of': 8}
    """

    right: int
    of: int

    @property
    def rate(self) -> float | None:
        return self.right / self.of if self.of else None

    def to_json(self) -> dict:
        rate = None if self.rate is None else round(self.rate, 4)
        return {"rate": rate, "right": self.right, "of": self.of}


def score_captions(
    reading: Reading, scenes: Scenes, says: dict[str, Tensor], attributes: tuple[str, ...] = ATTRIBUTES
) -> dict[str, dict[str, Tally]]:
    """Score images by kind of scene and attribute.

    Args:
        reading: of n images that were generated from captions.
        scenes: n of them, which the captions describe.
        says: what each caption states, see data.synthetic.captions.stated.
        attributes: which to score, some of ATTRIBUTES.

    Returns:
        {kind of scene: {attribute: Tally}} without attributes that no caption states.
    """
    right, applies = judge(reading, scenes, says)
    table: dict[str, dict[str, Tally]] = {}
    for index, kind in enumerate(KINDS):
        for name in attributes:
            asked = applies[name] & (scenes["kind"] == index)
            if asked.any():
                tally = Tally(int((right[name] & asked).sum()), int(asked.sum()))
                table.setdefault(kind, {})[name] = tally
    return table


def judge(
    reading: Reading, scenes: Scenes, says: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which attributes are right, and which a caption states.

    Objects of the scene are assigned to objects of the image so that most shapes and colours agree.
    count: there are as many objects as stated. color, shape: those of all objects are there, in any
    combination. binding: colour and shape of every object agree. size, fill, relation: right under every
    assignment that is as good as the best one, so an object that cannot be recognised earns nothing. In
    "count" scenes, whose objects are alike, an attribute is right if every object of the image has it.

    Args:
        reading, scenes, says: see `score_captions`.

    Returns:
        right, applies: two dicts of bool [n] with keys ATTRIBUTES.
    """
    same = {name: _agreement(reading, scenes, name) for name in ("shape", "color", "size", "fill")}
    used = torch.arange(MATCHED) < scenes["nobj"].clamp_max(MATCHED)[:, None]  # [n, MATCHED]
    alike = scenes["kind"] == COUNT
    unstated = {name: ~says[name][:, :MATCHED] | ~used for name in ("size", "fill")}
    pairs, relations = [], _relations(reading)
    results: dict[str, list[Tensor]] = {name: [] for name in (*same, "binding", "relation")}
    for order in permutations(range(MATCHED)):
        hit = {name: table[:, range(MATCHED), order] for name, table in same.items()}  # [n, MATCHED]
        pairs.append(((hit["shape"] + 0 + hit["color"]) * used).sum(1))
        results["shape"].append((hit["shape"] | ~used).all(1))
        results["color"].append((hit["color"] | ~used).all(1))
        results["binding"].append(((hit["shape"] & hit["color"]) | ~used).all(1))
        for name in ("size", "fill"):
            results[name].append((hit[name] | unstated[name]).all(1))
        relation = relations[:, order[0], order[1]]  # bool [n, 5]
        results["relation"].append(relation.gather(1, scenes["rel"].clamp_min(0)[:, None])[:, 0])
    agreement = torch.stack(pairs)  # [orders, n]
    best = agreement == agreement.amax(0)
    stacked = {name: torch.stack(rows) for name, rows in results.items()}
    right = {name: stacked[name].any(0) for name in ("shape", "color", "binding")}
    right |= {name: (stacked[name] | ~best).all(0) for name in ("size", "fill", "relation")}

    present = reading.color >= 0
    for name in ("shape", "color", "size", "fill"):  # equal objects: every object of the image
        every = ((getattr(reading, name) == scenes[name][:, :1]) | ~present).all(1) & present.any(1)
        right[name] = torch.where(alike, every, right[name])
    right["binding"] = torch.where(alike, right["shape"] & right["color"], right["binding"])
    right["count"] = reading.count == scenes["nobj"]
    right["position"] = _position(reading) == scenes["pos"]
    right["background"] = reading.background == scenes["bg"]
    right["texture"] = reading.texture == scenes["btex"]

    always = torch.ones_like(alike)
    applies = dict.fromkeys(("count", "color", "shape", "binding", "everything"), always)
    applies |= {name: ~unstated[name].all(1) for name in ("size", "fill")}
    applies |= dict(position=says["pos"], relation=says["rel"], background=says["bg"], texture=says["btex"])
    right["everything"] = torch.stack(
        [right[name] | ~applies[name] for name in ATTRIBUTES if name != "everything"]
    ).all(0)
    return right, applies


def _agreement(reading: Reading, scenes: Scenes, name: str) -> Tensor:
    """bool [n, object of the scene, object of the image], the MATCHED first of each: same value?"""
    return scenes[name][:, :MATCHED, None] == getattr(reading, name)[:, None, :MATCHED]


def _relations(reading: Reading) -> Tensor:
    """bool [n, a, b, 5]: is object a (left of, right of, above, below, around) object b?"""
    x, y, holder = (value[:, :MATCHED] for value in (reading.x, reading.y, reading.holder))
    dx, dy = x[:, :, None] - x[:, None], y[:, :, None] - y[:, None]
    across, down = dx.abs() > dy.abs(), dy.abs() > dx.abs()  # nan compares as False
    around = holder[:, None] == torch.arange(x.shape[1])[None, :, None]
    apart = ~around & ~around.transpose(1, 2)
    left, right, above, below = across & (dx < 0), across & (dx > 0), down & (dy < 0), down & (dy > 0)
    return torch.stack([left & apart, right & apart, above & apart, below & apart, around], -1)  # RELATIONS


def _position(reading: Reading) -> Tensor:
    """int64 [n]: the cell (index of POSITIONS) of the largest object; -1 without one.

    Centres of cells lie CELL from the centre of the canvas, or nearer where the object would leave the
    canvas; the border between two cells is half-way.
    """
    extent = geometry().extent[reading.shape[:, 0].clamp_min(0)] * reading.radius[:, 0]
    border = (0.5 - MARGIN - extent).clamp(0.1, CELL) / 2
    column, row = ((place[:, 0] - 0.5) / border for place in (reading.x, reading.y))
    cell = [(value > 1).long() - (value < -1).long() + 1 for value in (column, row)]
    return torch.where(reading.color[:, 0] >= 0, cell[1] * 3 + cell[0], -1)
