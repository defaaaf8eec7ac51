"""Hard negatives: captions that one exchange or one change makes wrong for an image.

A bag of words distinguishes a caption from random ones, but not from these. The wrong caption is the phrasing
of the right one, applied to an edited scene, so that only the meaning differs. An edit counts only if
- the caption states it and becomes false by it (both orders of "a red star and a blue ring" are true), and
- a scene of the split can have the edited attributes: otherwise implausible words would give the negative
  away, and pairs that are held out of training would be learnt as always wrong.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.captions import NAMED_OBJECTS, Phrasing, compose, draw_phrasing, stated
from dalle2_fast.data.synthetic.scenes import SPLITS, Scenes, in_split, is_sound, valid_slots
from dalle2_fast.data.synthetic.vocabulary import (
    ABOVE,
    BELOW,
    COUNT,
    INSIDE,
    LEFT,
    MAX_OBJECTS,
    ONE,
    RIGHT,
    THREE,
    TWO,
)
from dalle2_fast.data.synthetic.world import World

# A weight is large for what is hard to learn. With weights of 1 and 2, a CLIP
# that had seen 106k images distinguished top from bottom, but not left from right: a linear probe of the
# image embedding found the column of a single object in 58 % of images. 26k more images with these weights
# made it 80 %.
NEGATIVE_KINDS = {
    "swap_colors": 2.0,
    "swap_shapes": 2.0,
    "swap_sizes": 1.0,
    "swap_fills": 1.0,
    "swap_objects": 6.0,
    "change_relation": 3.0,
    "change_color": 0.5,
    "change_shape": 1.0,
    "change_size": 1.0,
    "change_fill": 1.0,
    "change_count": 1.0,
    "change_position": 8.0,
    "change_background": 1.0,
    "change_texture": 1.0,
}
"""Kinds of negatives, and the weight with which `sample_negatives` draws each."""
_SCENE_ATTRIBUTES = {"change_background": ("bg", "backgrounds"), "change_texture": ("btex", "textures")}
_INVERSE_RELATION = {LEFT: RIGHT, RIGHT: LEFT, ABOVE: BELOW, BELOW: ABOVE, INSIDE: -1}


def hard_negatives(
    scenes: Scenes,
    generator: torch.Generator | None = None,
    kind: str = "swap_colors",
    *,
    phrasing: Phrasing | None = None,
    split: str = "all",
    world: World | None = None,
) -> tuple[Scenes, Tensor]:
    """Edit scenes so that their captions become hard negatives of the images.

    Edited scenes keep their positions and radii: caption them with `compose(edited, phrasing)`, but do not
    render them.

    Args:
        scenes: n scenes.
        generator: on the device of the scenes; None takes torch's default generator.
        kind: "swap_colors", "swap_shapes", "swap_sizes" and "swap_fills" exchange an attribute of two
            objects, "swap_objects" exchanges the objects, which reverses a relation, and "change_..." samples
            another relation, color, shape, size, fill, count, position, background or texture of the world.
        phrasing: of the captions, from `draw_phrasing`; None states everything (`drop=0`).
        split: "train" and "iid" refuse negatives that show what these splits leave out.
        world: of the scenes; None takes the whole world.

    Returns:
        The edited scenes, and which of them are hard negatives, bool [n].

    Raises:
        ValueError: the kind or the split does not exist.

    Example:
        >>> from dalle2_fast.data import World, sample_scenes
        >>> scenes = sample_scenes(2, world=World(kinds=["one"]))
        >>> edited, hard = hard_negatives(scenes, kind="change_color")
        >>> (edited["color"][:, 0] != scenes["color"][:, 0]).all().item(), hard.shape
        (True, torch.Size([2]))
    """
    if kind not in NEGATIVE_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(NEGATIVE_KINDS)}; got {kind!r}")
    if phrasing is None:
        phrasing = draw_phrasing(len(scenes["kind"]), generator, scenes["kind"].device, drop=0)
    edited = _edit(scenes, kind, generator, world or World())
    return edited, _is_hard(scenes, edited, phrasing, split, world)


def sample_negatives(
    scenes: Scenes,
    phrasing: Phrasing,
    generator: torch.Generator | None = None,
    *,
    count: int = 3,
    kinds: dict[str, float] | None = None,
    split: str = "train",
    world: World | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample hard negatives of different kinds for every caption `compose(scenes, phrasing)`.

    Args:
        scenes: n scenes.
        phrasing: of their captions, from `draw_phrasing`.
        generator: on the device of the scenes; None takes torch's default generator.
        count: negatives per caption, from 1 to the number of kinds.
        kinds: name -> weight, sampled among those that apply to the caption; None takes NEGATIVE_KINDS.
        split: "train" and "iid" refuse negatives that show what these splits leave out.
        world: of the scenes; None takes the whole world.

    Returns:
        tokens: int64 [n, count, 36].
        mask: bool [n, count], False where too few kinds apply; do not use these tokens.
        kinds: int64 [n, count], indices into the keys of `kinds`.

    Raises:
        ValueError: the count is out of range, or a kind or the split does not exist.

    Example:
        >>> from dalle2_fast.data import draw_phrasing, sample_scenes
        >>> tokens, mask, kinds = sample_negatives(sample_scenes(4), draw_phrasing(4), count=2)
        >>> tokens.shape, mask.shape, kinds.shape
        (torch.Size([4, 2, 36]), torch.Size([4, 2]), torch.Size([4, 2]))
    """
    kinds = NEGATIVE_KINDS if kinds is None else kinds
    if not 1 <= count <= len(kinds):
        raise ValueError(f"count: expected 1 to {len(kinds)} (the number of kinds), got {count}")
    unknown = [kind for kind in kinds if kind not in NEGATIVE_KINDS]
    if unknown:
        raise ValueError(f"kinds: expected names of {', '.join(NEGATIVE_KINDS)}; got {', '.join(unknown)}")
    n, device = len(scenes["kind"]), scenes["kind"].device
    scenes = {key: value for key, value in scenes.items() if value.dtype == torch.int64}  # without positions
    # All kinds of all scenes at once, [kinds * n] rows: few large operations instead of many small ones.
    parts = [_edit(scenes, kind, generator, world or World()) for kind in kinds]
    edited = {key: torch.cat([part[key] for part in parts]) for key in scenes}
    rows = torch.arange(n, device=device).repeat(len(kinds))
    true = {key: value[rows] for key, value in scenes.items()}
    hard = _is_hard(true, edited, phrasing.rows(rows), split, world).view(len(kinds), n).T

    # Weighted sampling without replacement: the smallest of exponential variates with rates = weights.
    weights = torch.tensor(list(kinds.values()), device=device)
    uniform = torch.rand(n, len(kinds), generator=generator, device=device)
    waiting = -torch.log1p(-uniform) / weights
    chosen = waiting.masked_fill(~hard, float("inf")).argsort(dim=1, stable=True)[:, :count]  # [n, count]
    scene = torch.arange(n, device=device)[:, None].expand_as(chosen).reshape(-1)
    picked = chosen.reshape(-1) * n + scene
    tokens = compose({key: value[picked] for key, value in edited.items()}, phrasing.rows(scene))
    return tokens.view(n, count, -1), hard.gather(1, chosen), chosen


def contradicts(scenes: Scenes, claimed: Scenes, says: dict[str, Tensor]) -> Tensor:
    """Whether captions of `claimed` are false of `scenes`, bool [n].

    Args:
        scenes: the n real scenes.
        claimed: the n scenes that the captions describe, of the same kinds.
        says: which attributes the captions state (see `stated`); the others claim nothing.
    """

    def agrees(key: str) -> Tensor:  # [n, claimed object, real object]
        return claimed[key][:, :NAMED_OBJECTS, None] == scenes[key][:, None, :NAMED_OBJECTS]

    said_size, said_fill = (says[key][:, :NAMED_OBJECTS, None] for key in ("size", "fill"))
    match = agrees("shape") & agrees("color")
    match &= (agrees("size") | ~said_size) & (agrees("fill") | ~said_fill)

    def matches(*order: int) -> Tensor:  # whether claimed object i is real object order[i]
        return torch.stack([match[:, i, j] for i, j in enumerate(order)]).all(0)

    kind, rel = scenes["kind"], scenes["rel"]
    inverse = torch.tensor([*_INVERSE_RELATION.values(), -1], device=rel.device)[rel]  # the last: rel = -1
    same_order = matches(0, 1) & ((claimed["rel"] == rel) | ~says["rel"])
    other_order = matches(1, 0) & ((claimed["rel"] == inverse) | ~says["rel"])
    three = torch.stack([matches(*order) for order in permutations(range(3))]).any(0)
    true = torch.where(kind == TWO, same_order | other_order, torch.where(kind == THREE, three, matches(0)))
    true &= (claimed["nobj"] == scenes["nobj"]) & (claimed["kind"] == kind)
    for key in ("pos", "bg", "btex"):
        true &= (claimed[key] == scenes[key]) | ~says[key]
    return ~true


def _is_hard(scenes: Scenes, edited: Scenes, phrasing: Phrasing, split: str, world: World | None) -> Tensor:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}; got {split!r}")
    hard = contradicts(scenes, edited, stated(edited, phrasing)) & is_sound(edited, world)
    return hard & in_split(edited, split) if split in ("train", "iid") else hard


def _edit(scenes: Scenes, kind: str, generator: torch.Generator | None, world: World) -> Scenes:
    """The scenes after one edit; unchanged where the edit does not apply."""
    scene_kind, device = scenes["kind"], scenes["kind"].device
    n = len(scene_kind)

    def integers(high: int) -> Tensor:
        return torch.randint(0, high, (n,), generator=generator, device=device)

    def another(old: Tensor, ids: Tensor) -> Tensor:
        """For each id of the table `ids`, another one of it, or the same if there is no other."""
        position = (old[:, None] == ids).int().argmax(1)
        return ids[(position + 1 + integers(max(len(ids) - 1, 1))) % len(ids)]

    if kind.startswith("swap_"):
        partner = _partners(scene_kind, integers(3))
        key = kind.removeprefix("swap_").removesuffix("s")
        names = ("shape", "color", "size", "fill") if key == "object" else (key,)
        swapped = {name: scenes[name].gather(1, partner) for name in names}
        if key == "object":
            inside = (scenes["rel"] == INSIDE)[:, None]  # the outer object stays the large one
            swapped["size"] = torch.where(inside, scenes["size"], swapped["size"])
        return scenes | swapped

    if kind in _SCENE_ATTRIBUTES:
        key, attribute = _SCENE_ATTRIBUTES[kind]
        return scenes | {key: another(scenes[key], world.ids(attribute, device))}
    if kind == "change_relation":
        new = another(scenes["rel"], world.ids("relations", device))
        return scenes | {"rel": torch.where(scene_kind == TWO, new, scenes["rel"])}
    if kind == "change_position":
        # Another row or another column, but not both, because then the easier of the two would be enough.
        pos, step, along_row = scenes["pos"], 1 + integers(2), integers(2) == 1
        new = torch.where(along_row, pos // 3 * 3 + (pos + step) % 3, (pos + 3 * step) % 9)
        return scenes | {"pos": torch.where(scene_kind == ONE, new, scenes["pos"])}
    if kind == "change_count":
        new = another(scenes["nobj"], torch.arange(2, MAX_OBJECTS + 1, device=device))
        return scenes | {"nobj": torch.where(scene_kind == COUNT, new, scenes["nobj"])}

    # One attribute of one object, or of all objects where they are alike.
    key = kind.removeprefix("change_")
    slot = integers(6) % scenes["nobj"].clamp(1, NAMED_OBJECTS)  # 6: a multiple of 1, 2 and 3
    slot = torch.where(scene_kind == COUNT, 0, slot)
    new = another(scenes[key].gather(1, slot[:, None])[:, 0], world.ids(key + "s", device))
    here = torch.arange(MAX_OBJECTS, device=device)[None] == slot[:, None]
    here |= (scene_kind == COUNT)[:, None] & valid_slots(scenes)
    return scenes | {key: torch.where(here, new[:, None], scenes[key])}


def _partners(kind: Tensor, draw: Tensor) -> Tensor:
    """The slot with which each slot is exchanged, int64 [n, K]; itself where nothing is exchanged."""
    identity, exchanges = list(range(MAX_OBJECTS)), []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        order = identity.copy()
        order[a], order[b] = b, a
        exchanges.append(order)
    table = torch.tensor([*exchanges, identity], device=kind.device)
    choice = torch.where(kind == TWO, 0, torch.where(kind == THREE, draw, len(exchanges)))
    return table[choice]
