"""Scenes: random, valid arrangements of objects, as a dict of tensors.

A dict of n scenes has K = 5 object slots, of which the first `nobj` are used:
    kind [n]          int64, index into KINDS
    nobj [n]          int64, 1..5
    shape, color, fill, size [n, K]   int64, indices into SHAPES, COLORS, FILLS, SIZES
    r, rot, cx, cy [n, K]   float32: radius and centre in units of the canvas (y down), rotation in radians
    rel [n]           int64: slot 0 is RELATIONS[rel] of slot 1 ("inside": slot 1 inside slot 0); -1 unless
                      the kind is "two"
    pos [n]           int64, index into POSITIONS; -1 unless the kind is "one"
    bg, btex [n]      int64, indices into BACKGROUNDS, TEXTURES
    cj [n, K, 3], bj [n, 3], ph [n, 2]   float32: colour jitter of objects, of the background; texture phase
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.palette import palette
from dalle2_fast.data.synthetic.shapes import JITTER_DEGREES, geometry
from dalle2_fast.data.synthetic.vocabulary import (
    ABOVE,
    BACKGROUNDS,
    COLORS,
    COUNT,
    INSIDE,
    LARGE,
    LEFT,
    MAX_OBJECTS,
    MEDIUM,
    ONE,
    SHAPES,
    SMALL,
    SOLID,
    THREE,
    TWO,
)
from dalle2_fast.data.synthetic.world import OUTER_SHAPES, World

Scenes = dict[str, Tensor]

SPLITS = ("train", "iid", "comp", "all")
"""Splits of the scenes, see `sample_scenes`: every scene of "comp" shows a pair that "train" never has."""
MARGIN = 0.035  # between an object and the edge of the canvas
CELL = 0.27  # from the middle of the canvas to the outer cells of the 3 x 3 positions, where there is room
GAP = 0.05  # at least, between two related objects
PAIR_EXTENT = 0.435  # the largest sum of two half extents with which both objects fit on the canvas
STALE_ROUNDS = 40  # rounds of proposals without one accepted scene before sampling gives up


def valid_slots(scenes: Scenes) -> Tensor:
    """Which object slots are used, bool [n, K]."""
    return torch.arange(MAX_OBJECTS, device=scenes["nobj"].device)[None] < scenes["nobj"][:, None]


def held_out_pairs(device: torch.device | str = "cpu") -> Tensor:
    """The 12 pairs that no training scene shows, bool [12 shapes, 12 colours].

    Example:
        >>> held_out_pairs().sum().item()
        12
    """
    held = torch.zeros(len(SHAPES), len(COLORS), dtype=torch.bool, device=device)
    shapes = torch.arange(len(SHAPES), device=device)
    held[shapes, (5 * shapes + 3) % 12] = True
    return held


def has_held_out_pair(scenes: Scenes) -> Tensor:
    """Whether an object of each scene has a held-out pair of shape and colour, bool [n]."""
    held = held_out_pairs(scenes["shape"].device)[scenes["shape"], scenes["color"]]
    return (held & valid_slots(scenes)).any(1)


def has_held_out_relation(scenes: Scenes) -> Tensor:
    """Whether (object, relation, object) is one of the tenth of all such tuples that training leaves out,
    bool [n]."""
    shape, color = scenes["shape"], scenes["color"]
    code = torch.full_like(shape[:, 0], 7)
    for column in (shape[:, 0], color[:, 0], shape[:, 1], color[:, 1], scenes["rel"].clamp_min(0)):
        code = (code * 1000003 + column * 7919 + 12345) % 2147483647
    return (scenes["kind"] == TWO) & (code % 10 == 0)


def in_split(scenes: Scenes, split: str) -> Tensor:
    """Whether each scene belongs to a split, bool [n].

    Args:
        scenes: n scenes.
        split: "train" has nothing that is held out, "iid" no held-out pair of shape and colour, "comp" at
            least one such pair, "all" everything.

    Raises:
        ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}; got {split!r}")
    if split == "train":
        return ~has_held_out_pair(scenes) & ~has_held_out_relation(scenes)
    if split == "iid":
        return ~has_held_out_pair(scenes)
    if split == "comp":
        return has_held_out_pair(scenes)
    return torch.ones_like(scenes["kind"], dtype=torch.bool)


def sample_scenes(
    n: int,
    generator: torch.Generator | None = None,
    split: str = "train",
    world: World | None = None,
    device: torch.device | str = "cpu",
) -> Scenes:
    """Sample random scenes.

    Args:
        n: how many, from 0.
        generator: on `device`; None takes torch's default generator.
        split: "train" leaves out 12 of the 144 pairs of shape and colour and a tenth of the tuples (object,
            relation, object); "iid" leaves out the pairs only; every scene of "comp" shows such a pair; "all"
            leaves out nothing.
        world: what scenes may show; None takes the whole world.
        device: of the tensors.

    Returns:
        The dict of tensors that the module describes.

    Raises:
        ValueError: `n` is no int >= 0, the split does not exist, or the world has no scene in it.

    Example:
        >>> scenes = sample_scenes(3, torch.Generator().manual_seed(0))
        >>> scenes["shape"].shape, scenes["kind"].dtype
        (torch.Size([3, 5]), torch.int64)
    """
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"n: expected an int >= 0, got {n!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}; got {split!r}")
    world, parts, found, stale = world or World(), [], 0, 0
    while not parts or found < n:
        proposals = int((n - found) * (8 if split == "comp" else 1.6)) + 64
        scenes, accepted = _propose(proposals, generator, world, torch.device(device))
        accepted &= in_split(scenes, split)
        rows = accepted.nonzero()[:, 0]  # once, because the host of a GPU waits for it
        parts.append({key: value[rows] for key, value in scenes.items()})
        found += len(parts[-1]["kind"])
        stale = 0 if len(parts[-1]["kind"]) else stale + 1
        if stale == STALE_ROUNDS and n:
            raise ValueError(f"world: {world} has no scene (or almost none) in the split {split!r}")
    return {key: torch.cat([part[key] for part in parts])[:n] for key in parts[0]}


def _propose(
    n: int, generator: torch.Generator | None, world: World, device: torch.device
) -> tuple[Scenes, Tensor]:
    """Random scenes, and which of them are sound. The order of the random numbers must stay: it is pinned."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator, device=device)

    def weighted(attribute: str, count: int) -> Tensor:
        weights = world.weights(attribute, device)
        return torch.multinomial(weights, count, replacement=True, generator=generator)

    slots, shape_table, colors = MAX_OBJECTS, geometry(device), palette(device)
    kind = weighted("kinds", n)
    if "shapes" in world.factors:
        shape = weighted("shapes", n * slots).view(n, slots)
    else:
        shape = world.ids("shapes", device)[integers(len(world.shapes), n, slots)]
    color = world.ids("colors", device)[integers(len(world.colors), n, slots)]
    fill = weighted("fills", n * slots).view(n, slots)
    size = weighted("sizes", n * slots).view(n, slots)
    rel = torch.where(kind == TWO, weighted("relations", n), -1)
    pos = torch.where(kind == ONE, integers(9, n), -1)
    several = integers(4, n) + 2
    nobj = torch.where(kind == ONE, 1, torch.where(kind == TWO, 2, torch.where(kind == COUNT, several, 3)))

    # "count": all objects are alike, and small enough for their grid.
    alike = (kind == COUNT)[:, None]
    for attribute in (shape, color, fill, size):
        attribute.copy_(torch.where(alike, attribute[:, :1], attribute))
    size = torch.where((alike | (kind == THREE)[:, None]) & (size == LARGE), MEDIUM, size)
    size = torch.where(alike & (nobj > 4)[:, None], world.ids("sizes", device).min(), size)

    # "inside": slot 1 lies in slot 0.
    inside = rel == INSIDE
    outer = [SHAPES.index(name) for name in OUTER_SHAPES if name in world.shapes] or [0]
    outer = torch.tensor(outer, device=device)
    shape[:, 0] = torch.where(inside, outer[integers(len(outer), n)], shape[:, 0])
    size[:, 0], size[:, 1] = torch.where(inside, LARGE, size[:, 0]), torch.where(inside, SMALL, size[:, 1])
    fill[:, :2] = torch.where(inside[:, None], SOLID, fill[:, :2])

    # "two": shrink the larger object until both fit.
    apart = (kind == TWO) & ~inside
    for _ in range(3):
        crowded = apart & (_pair_extent(shape, size) > PAIR_EXTENT)
        first_larger = size[:, 0] >= size[:, 1]
        size[:, 0] = torch.where(crowded & first_larger, size[:, 0] - 1, size[:, 0]).clamp_min(0)
        size[:, 1] = torch.where(crowded & ~first_larger, size[:, 1] - 1, size[:, 1]).clamp_min(0)
    fill = torch.where(shape_table.fill_visible[shape, size], fill, SOLID)

    radii = shape_table.radii[size]
    r = radii[..., 0] + (radii[..., 1] - radii[..., 0]) * uniform(n, slots)
    r = torch.where(alike, r[:, :1], r)
    extent = shape_table.extent[shape] * r
    rot = (uniform(n, slots) - 0.5) * 2 * math.radians(JITTER_DEGREES)
    layout = dict(kind=kind, rel=rel, pos=pos, size=size, extent=extent)
    cx, cy = _place(layout, uniform)

    # Background: one on which every object can be seen.
    slot_used = torch.arange(slots, device=device)[None] < nobj[:, None]
    visible = (colors.allowed[color, fill] | ~slot_used[..., None]).all(1)  # [n, backgrounds]
    in_world = torch.zeros(len(BACKGROUNDS), dtype=torch.bool, device=device)
    in_world[world.ids("backgrounds", device)] = True
    choices = (visible & in_world).float()
    # multinomial needs at least one choice; is_sound refuses these scenes
    choices[:, 0] = torch.where(choices.sum(1) == 0, 1.0, choices[:, 0])
    bg = torch.multinomial(choices, 1, generator=generator)[:, 0]
    btex = weighted("textures", n)
    jitter = dict(
        cj=(uniform(n, slots, 3) - 0.5) * 0.05,
        bj=(uniform(n, 3) - 0.5) * 0.04,
        ph=uniform(n, 2),
    )
    scenes = dict(
        kind=kind, nobj=nobj, shape=shape, color=color, fill=fill, size=size, r=r, rot=rot, cx=cx, cy=cy,
        rel=rel, pos=pos, bg=bg, btex=btex, **jitter,
    )  # fmt: skip
    return scenes, is_sound(scenes, world)


def _pair_extent(shape: Tensor, size: Tensor) -> Tensor:
    """The largest sum of the half extents of slots 0 and 1, [n]."""
    table = geometry(shape.device)
    extent = table.extent[shape[:, :2]] * table.radii[size[:, :2], 1]
    return extent[:, 0] + extent[:, 1]


def _bounded(value: Tensor, bound: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(value, bound), -bound)


def _place(layout: Scenes, uniform) -> tuple[Tensor, Tensor]:
    """The centres of all objects, two tensors [n, K].

    Every kind of arrangement takes random numbers for every scene, so that none of them depends on the data.
    """
    kind, rel, pos, extent = layout["kind"], layout["rel"], layout["pos"], layout["extent"]
    n, slots, device = *extent.shape, extent.device
    cx, cy = torch.full((n, slots), 0.5, device=device), torch.full((n, slots), 0.5, device=device)
    inside, apart = rel == INSIDE, (kind == TWO) & (rel != INSIDE)

    # "one": a cell of the 3 x 3 positions.
    room = 0.5 - MARGIN - extent[:, 0]
    for centre, cell in ((cx, (pos % 3) - 1), (cy, (pos.clamp_min(0) // 3) - 1)):
        offset = cell * torch.minimum(torch.full_like(room, CELL), room) + (uniform(n) - 0.5) * 0.05
        centre[:, 0] = torch.where(kind == ONE, 0.5 + _bounded(offset, room), centre[:, 0])

    # "two": one after the other along the axis of the relation, nearly level on the other axis.
    slack = (1 - 2 * MARGIN - 2 * extent[:, 0] - 2 * extent[:, 1] - GAP).clamp_min(0)
    slack_fraction = uniform(n, 3)
    slack_fraction = slack_fraction / slack_fraction.sum(1, keepdim=True)
    slot0_first = (rel == LEFT) | (rel == ABOVE)
    extent_a = torch.where(slot0_first, extent[:, 0], extent[:, 1])
    extent_b = torch.where(slot0_first, extent[:, 1], extent[:, 0])
    place_a = MARGIN + slack_fraction[:, 0] * slack + extent_a
    place_b = place_a + extent_a + extent_b + GAP + slack_fraction[:, 1] * slack
    places = torch.where(slot0_first, place_a, place_b), torch.where(slot0_first, place_b, place_a)
    level = 0.5 + (uniform(n, 2) - 0.5) * 0.16
    horizontal = rel < ABOVE
    for slot, place in enumerate(places):
        cx[:, slot] = torch.where(apart, torch.where(horizontal, place, level[:, slot]), cx[:, slot])
        cy[:, slot] = torch.where(apart, torch.where(horizontal, level[:, slot], place), cy[:, slot])

    # "inside": the outer object anywhere, the inner one near its middle.
    middle = 0.5 + (uniform(n, 2) - 0.5) * 2 * (0.5 - MARGIN - extent[:, :1]).clamp_min(0)
    inner_only = torch.tensor([0.0, 1.0], device=device)
    for axis, centre in enumerate((cx, cy)):
        offset = (uniform(n, 2) - 0.5) * 0.03 * inner_only
        centre[:, :2] = torch.where(inside[:, None], middle[:, axis : axis + 1] + offset, centre[:, :2])

    # "count" and "three": different cells of a grid, 3 x 3 if all are small, else 2 x 2.
    nine = (kind == COUNT) & (layout["size"].amax(1) == SMALL)
    cell9 = torch.argsort(uniform(n, 9), 1)[:, :slots]
    cell4 = torch.nn.functional.pad(torch.argsort(uniform(n, 4), 1), (0, slots - 4))
    grid_x = torch.where(nine[:, None], 0.195 + 0.305 * (cell9 % 3), 0.27 + 0.46 * (cell4 % 2))
    grid_y = torch.where(nine[:, None], 0.195 + 0.305 * (cell9 // 3), 0.27 + 0.46 * (cell4 // 2))
    pitch = torch.where(nine, 0.305, 0.46)[:, None]
    jitter = ((pitch - 2 * extent.amax(1, keepdim=True) - MARGIN) / 2).clamp(0, 0.09)
    room = (0.5 - MARGIN - extent).clamp_min(0)
    many = (kind >= COUNT)[:, None]
    for centre, grid in ((cx, grid_x), (cy, grid_y)):
        place = 0.5 + _bounded(grid - 0.5 + (uniform(n, slots) - 0.5) * 2 * jitter, room)
        centre.copy_(torch.where(many, place, centre))
    return cx, cy


def is_sound(scenes: Scenes, world: World | None = None) -> Tensor:
    """Whether the attributes of each scene are possible, bool [n].

    The objects must differ visibly from their background and from each other, fit on the canvas, show their
    fill, and use nothing outside of the world. Positions are not looked at.

    Args:
        scenes: n scenes; kind, counts, looks and background are read.
        world: None takes the whole world.
    """
    shape, color, fill, size, kind = (scenes[key] for key in ("shape", "color", "fill", "size", "kind"))
    device, used, world = shape.device, valid_slots(scenes), world or World()
    colors, shape_table = palette(device), geometry(device)

    fine = (colors.allowed[color, fill, scenes["bg"][:, None]] | ~used).all(1)
    fine &= (shape_table.fill_visible[shape, size] | (fill == SOLID) | ~used).all(1)
    for attribute, plural in (("shape", "shapes"), ("color", "colors"), ("fill", "fills"), ("size", "sizes")):
        fine &= ((world.weights(plural, device) > 0)[scenes[attribute]] | ~used).all(1)
    for attribute, plural in (("kind", "kinds"), ("bg", "backgrounds"), ("btex", "textures")):
        fine &= (world.weights(plural, device) > 0)[scenes[attribute]]

    for a, b in ((0, 1), (0, 2), (1, 2)):  # two objects that look the same cannot be told apart
        same = (shape[:, a] == shape[:, b]) & (color[:, a] == color[:, b])
        fine &= ~(same & ((kind == THREE) | ((kind == TWO) & (b == 1))))

    inside = (kind == TWO) & (scenes["rel"] == INSIDE)
    outer = torch.tensor([name in OUTER_SHAPES for name in SHAPES], device=device)
    fits_inside = outer[shape[:, 0]] & (size[:, 0] == LARGE) & (size[:, 1] == SMALL)
    fits_inside &= (fill[:, :2] == SOLID).all(1) & colors.contrast[color[:, 0], color[:, 1]]
    fine &= fits_inside | ~inside
    fine &= (_pair_extent(shape, size) <= PAIR_EXTENT) | (kind != TWO) | inside
    relation_exists = (world.weights("relations", device) > 0)[scenes["rel"].clamp_min(0)]
    fine &= relation_exists | (kind != TWO)

    many_fit = torch.where(scenes["nobj"] > 4, size[:, 0] == SMALL, size[:, 0] <= MEDIUM)
    fine &= many_fit | (kind != COUNT)
    fine &= ((size <= MEDIUM) | ~used).all(1) | (kind != THREE)
    return fine


