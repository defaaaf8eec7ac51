"""The launch configurations that `tune` tries in place of the chosen ones."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dalle2_fast.kernels.contrastive._cuda import CudaBackend
from dalle2_fast.kernels.cross_attention import _common as attention_common
from dalle2_fast.kernels.cross_attention import _short_backward as attention_short_backward
from dalle2_fast.kernels.cross_attention import _split as attention_split
from dalle2_fast.kernels.cross_attention import forward as attention_forward
from dalle2_fast.kernels.diffusion import _statistics as step_statistics
from dalle2_fast.kernels.diffusion import step as diffusion_step
from dalle2_fast.kernels.group_norm_silu import _plan as norm_plan
from dalle2_fast.kernels.group_norm_silu import forward as norm_forward


class Change(NamedTuple):
    """While a variation runs, attribute `name` of `target` has this value."""

    target: object
    name: str
    value: object


Variation = tuple[str, str, list[Change]]  # case, what differs, changes


def constants(module, **values) -> list[Change]:
    """Constants, or small functions, of a module."""
    return [Change(module, name, value) for name, value in values.items()]


class WithOptions:
    """A kernel that is launched with other options."""

    def __init__(self, kernel, **options) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.kernel[grid](*args, **(kwargs | self.options))


def options(module, kernel: str, **values) -> list[Change]:
    """Launch options of one kernel of a module."""
    return [Change(module, kernel, WithOptions(getattr(module, kernel), **values))]


def launch_config(module, function: str = "_launch_config", **values) -> list[Change]:
    """Entries of all launch configurations that this function of a module gives."""
    chosen = getattr(module, function)
    return [Change(module, function, lambda *args: chosen(*args) | values)]


def keys_split(rows: int, whole_waves: int | None, parts: int) -> list[Change]:
    """The split of the keys in the long form, on 132 multiprocessors. whole_waves=None: no tile is split."""

    def plan(pairs, queries, blocks, tiles, capability) -> attention_split.Split:
        count = pairs * -(-queries // rows)
        return attention_split.Split(rows, count if whole_waves is None else whole_waves * 132, parts)

    return [Change(attention_forward, "plan", plan)]


def programs_per_head(resident: int, parts: int) -> list[Change]:
    """The number of attention programs for each (batch, head), in the launcher that calls `split` with this
    `resident`: 2 forward, 1 backward."""
    chosen = attention_common.split

    def split(pairs, tiles, capability, **balance):
        return parts if balance["resident"] == resident else chosen(pairs, tiles, capability, **balance)

    return [Change(attention_common, "split", split)]


def source(module, kernel: str, *replacements: tuple[str, str]) -> list[Change]:
    """A kernel with other source text: (text, its replacement)."""
    function = getattr(module, kernel).fn
    home = sys.modules[function.__module__]  # it has the names that the kernel uses
    text = inspect.getsource(function)
    for old, new in replacements:
        if old not in text:
            raise ValueError(f"{kernel}: expected {old!r} in its source")
        text = text.replace(old, new)
    folder = Path(tempfile.mkdtemp())  # it stays, because triton.jit reads the file again
    path = folder / f"variation_{len(sys.modules)}.py"
    names = ", ".join(name for name in vars(home) if not name.startswith("__") and name != "annotations")
    path.write_text(f"from {home.__name__} import {names}\n{text}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    variant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(variant)
    return [Change(module, kernel, getattr(variant, kernel))]


class Launcher:
    """A function (grid, *arguments) in place of a kernel."""

    def __init__(self, function) -> None:
        self.function = function

    def __getitem__(self, grid):
        return functools.partial(self.function, grid)


def in_slices(samples: int) -> list[Change]:
    """Both launches of a norm whose slabs are cut into chunks, for a few samples at a time.

    The second launch of a slice then reads x from L2, if the slice of x and of y fits there.
    """
    moments, apply = norm_forward._moments_kernel, norm_forward._apply_kernel

    def both(
        grid, x, y, mean, rstd, partial, weight, bias, scale, shift, *numbers, SILU, MAX_CHUNKS, **sizes
    ):  # fmt: skip
        groups, channels, positions, x_stride, _, *strides, slabs, chunks, each = numbers[3:]
        for first in range(0, len(x), samples):
            here = slice(first, first + samples)
            x_here, *given = (value if value is None else value[here] for value in (x, y, mean, rstd))
            film = (value if value is None else value[here] for value in (scale, shift))
            sums = partial.flatten()[first * groups * chunks :]
            programs = (grid[0] * len(x_here) // len(x),)
            moments[programs](
                x_here, sums, groups, channels, positions, x_stride, *strides, slabs, chunks, each, **sizes
            )
            apply[programs](
                x_here, *given, sums, weight, bias, *film, *numbers, SILU=SILU, MAX_CHUNKS=MAX_CHUNKS, **sizes
            )

    nothing = Launcher(lambda *args, **kwargs: None)  # the second launch makes both
    return constants(norm_forward, _moments_kernel=nothing, _apply_kernel=Launcher(both))


def variations() -> Iterator[Variation]:
    """All variations, in a fixed order: `tune --first` counts them."""
    yield from norm_variations()
    yield from attention_variations()
    yield from step_variations()
    yield from short_backward_variations()
    yield from loss_variations()


def norm_variations() -> Iterator[Variation]:
    looped = norm_forward, "_looped_kernel"
    first = (', eviction_policy="evict_first"', "")
    keep = ("mask=inside, other=0.0)", 'mask=inside, other=0.0, eviction_policy="evict_last")')
    for case in ("norm film silu forward", "norm silu forward"):
        yield case, "no cache hints", source(*looped, first)
        yield case, "a hint in the first pass, too", source(*looped, keep)
        for registers in (40, 48):
            yield case, f"{registers} registers", options(*looped, maxnreg=registers)
        for lanes, warps in ((2048, 8), (4096, 8), (4096, 16), (8192, 8), (8192, 32), (16384, 32)):
            yield case, f"{lanes} lanes, {warps} warps", constants(
                norm_plan, FORWARD_LANES=lanes, FORWARD_WARPS=warps
            )
        yield case, "4096 lanes, 16 warps, 40 registers", constants(
            norm_plan, FORWARD_LANES=4096, FORWARD_WARPS=16
        ) + options(*looped, maxnreg=40)
        yield case, "resident", constants(norm_plan, RESIDENT_LANES=40960)
    case = "norm silu forward channels_last"
    for lanes, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16)):
        for programs in (4, 8, 16):
            if (lanes, warps, programs) != (4096, 4, 8):
                yield case, f"{lanes} lanes, {warps} warps, {programs} programs", constants(
                    norm_plan, CHUNK_LANES=lanes, CHUNK_WARPS=warps, COLUMN_PROGRAMS=programs
                )
    # With fewer warps, which hold more values a thread, both sweeps were faster at equal lanes.
    for lanes, warps in ((8192, 4), (4096, 2), (2048, 2), (2048, 1), (1024, 1)):
        for programs in (8, 16):
            yield case, f"{lanes} lanes, {warps} warps, {programs} programs", constants(
                norm_plan, CHUNK_LANES=lanes, CHUNK_WARPS=warps, COLUMN_PROGRAMS=programs
            )
    for groups in (3, 6, 16, 32):  # 12 are chosen: 120 of 128 lanes, and runs of 240 bytes
        yield case, f"{groups} groups a program", constants(
            norm_plan, _column_groups=lambda *shape, groups=groups, **limits: groups
        )
    for samples in (4, 8, 16):
        yield case, f"slices of {samples} samples", in_slices(samples)
    yield case, "moments in 64 registers", options(norm_forward, "_moments_kernel", maxnreg=64)
    yield case, "moments, loop not unrolled", source(
        norm_forward, "_moments_kernel", (", loop_unroll_factor=2", "")
    )
    for groups in (2, 4, 8):
        for lanes, warps in ((4096, 8), (8192, 16)):
            name = f"read twice by one program, {groups} groups, {lanes} lanes, {warps} warps"
            yield case, name, constants(
                norm_plan, _few_groups=lambda width, count, itemsize, groups=groups: groups,
                FORWARD_MAX_LANES=1 << 20, FORWARD_LANES=lanes, FORWARD_WARPS=warps,
            )  # fmt: skip
    case = "norm silu forward upsampler"
    for lanes, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 4), (8192, 8)):
        for programs in (16, 32, 64):
            if (lanes, warps, programs) != (4096, 4, 64):
                yield case, f"{lanes} lanes, {warps} warps, {programs} programs", constants(
                    norm_plan, CHUNK_LANES=lanes, CHUNK_WARPS=warps, ROW_PROGRAMS=programs
                )
    yield case, "2048 lanes, 4 warps, loop unrolled 4 times", constants(
        norm_plan, CHUNK_LANES=2048, CHUNK_WARPS=4
    ) + source(norm_forward, "_moments_kernel", ("loop_unroll_factor=2", "loop_unroll_factor=4"))
    case = "norm film silu backward"
    for lanes, warps in ((2048, 4), (2048, 8), (4096, 8), (8192, 16)):
        yield case, f"looped, {lanes} lanes, {warps} warps", constants(
            norm_plan, LOOPED_LANES=lanes, LOOPED_WARPS=warps
        )
    case = "norms of the decoder, batch 2"
    for programs in (2, 4, 16):
        yield case, f"{programs} programs", constants(norm_plan, COLUMN_PROGRAMS=programs)
    for merged in (128, 1024):
        yield case, f"{merged} moments merged", constants(norm_plan, MERGED_MOMENTS=merged)
    for lanes, warps in ((2048, 8), (8192, 8)):
        yield case, f"chunks of {lanes} lanes, {warps} warps", constants(
            norm_plan, CHUNK_LANES=lanes, CHUNK_WARPS=warps
        )
    for lanes in (8192, 16384, 32768):
        yield case, f"resident up to {lanes}", constants(norm_plan, RESIDENT_LANES=lanes)
    for lanes, warps in ((4096, 8), (4096, 16), (16384, 32)):
        yield case, f"read twice in tiles of {lanes}, {warps} warps", constants(
            norm_plan, FORWARD_LANES=lanes, FORWARD_WARPS=warps
        )
    yield case, "read twice up to 32768", constants(norm_plan, FORWARD_MAX_LANES=32768)
    yield case, "read twice up to 131072", constants(norm_plan, FORWARD_MAX_LANES=131072)
    for groups in (2, 4):
        yield case, f"{groups} groups a program", constants(
            norm_plan, _few_groups=lambda width, count, itemsize, groups=groups: groups
        )
    chosen_warps = norm_plan._warps
    yield case, "twice the values a thread", [
        Change(norm_plan, "_warps", lambda lanes: max(1, chosen_warps(lanes) // 2))
    ]
    loop = "range(CHANNEL_TILES * POSITION_TILES)"
    for times in (2, 4):  # so that the loads of several tiles wait together
        text = f"for tile in tl.{loop[:-1]}, loop_unroll_factor={times})"
        yield case, f"first read unrolled {times} times", source(
            norm_forward, "_looped_kernel", (f"for tile in {loop}", text)
        )
    for lanes, warps in ((8192, 8), (16384, 16), (4096, 4)):
        yield case, f"read twice in tiles of {lanes}, {warps} warps", constants(
            norm_plan, FORWARD_LANES=lanes, FORWARD_WARPS=warps
        )
    for lanes, warps in ((8192, 4), (4096, 2)):
        yield case, f"chunks of {lanes} lanes, {warps} warps", constants(
            norm_plan, CHUNK_LANES=lanes, CHUNK_WARPS=warps
        )
    together = dict(RESIDENT_LANES=32768, CHUNK_LANES=8192, CHUNK_WARPS=8, FORWARD_LANES=16384)
    yield case, "the three that were 2 to 5 % faster, together", constants(
        norm_plan, **together, FORWARD_WARPS=32
    )
    for factor in (2, 4):
        yield case, f"a {factor}th of the values a thread", [
            Change(norm_plan, "_warps", lambda lanes, factor=factor: min(32, chosen_warps(lanes) * factor))
        ]


def attention_variations() -> Iterator[Variation]:
    for case in ("cross-attention forward", "cross-attention forward masked"):
        for rows, warps, stages in ((64, 4, 2), (64, 4, 4), (128, 8, 3), (128, 4, 3)):
            yield case, f"{rows} queries, {warps} warps, {stages} stages", launch_config(
                attention_forward, "_short_config", BLOCK_T=rows, num_warps=warps, num_stages=stages
            )
        for parts in (3, 5, 10, 13, 16):
            yield case, f"{parts} parts", programs_per_head(2, parts)
        yield case, "all checks", constants(
            attention_common, short_checks=lambda *sizes: {"CHECKED_KEYS": True, "CHECKED_ROWS": True}
        )
    case = "cross-attention forward and backward"
    for rows, warps, stages in ((128, 8, 2), (128, 8, 4), (64, 8, 2), (64, 8, 3)):
        yield case, f"{rows} queries, {warps} warps, {stages} stages", launch_config(
            attention_short_backward, BLOCK_T=rows, num_warps=warps, num_stages=stages
        )
    for parts in (2, 3, 5, 8):
        yield case, f"{parts} parts", programs_per_head(1, parts)
    for case in ("unclip attention, batch 2", "unclip attention, batch 64"):
        for rows, keys, warps, stages in (
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (128, 64, 8, 3),
            (128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4),
        ):  # fmt: skip
            yield case, f"{rows} queries, {keys} keys, {warps} warps, {stages} stages", keys_split(
                rows, None, 1
            ) + launch_config(
                attention_forward, "_long_config", BLOCK_S=keys, num_warps=warps, num_stages=stages
            )
    case = "unclip attention, batch 2"
    for rows, whole_waves, parts in (
        (64, 2, 2), (64, 2, 4), (64, 0, 2), (128, 0, 2), (128, 0, 3), (128, 1, 5),
    ):  # fmt: skip
        yield case, f"{rows} queries, keys in {parts} parts after {whole_waves} waves", keys_split(
            rows, whole_waves, parts
        )


def step_variations() -> Iterator[Variation]:
    for case in ("diffusion step, decoder, batch 4", "diffusion step, 256 px, batch 64",
                 "diffusion step, dynamic threshold, batch 64"):  # fmt: skip
        for size, warps in ((256, 2), (512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 8)):
            yield case, f"{size} elements, {warps} warps", constants(
                diffusion_step, tile_config=lambda positions, both=(size, warps): both
            )
    for tile, warps in ((4096, 8), (4096, 16), (8192, 8), (8192, 32), (16384, 16), (16384, 32)):
        case = "diffusion step, dynamic threshold, batch 64"
        yield case, f"statistics of {tile}, {warps} warps", constants(
            step_statistics, _config=lambda elements, both=(tile, warps): (False, *both)
        )


def short_backward_variations() -> Iterator[Variation]:
    """Late in the order: with one stage (Triton 3.6), an earlier form of this kernel made an illegal memory
    access, which ends a process's work on the GPU."""
    case = "cross-attention forward and backward"
    for stages, parts in ((3, 3), (2, 3), (3, 8), (1, 3)):
        yield case, f"64 queries, 4 warps, {stages} stages, {parts} parts", launch_config(
            attention_short_backward, BLOCK_T=64, num_warps=4, num_stages=stages
        ) + programs_per_head(1, parts)


def loss_variations() -> Iterator[Variation]:
    for case in ("contrastive loss, N = 32768, D = 512", "contrastive loss, N = 32768, D = 1024"):
        for megabytes, columns in (
            (256, 16384), (256, 8192), (128, 16384), (64, 8192), (32, 4096), (512, 32768),
        ):  # fmt: skip
            yield case, f"gradients of {megabytes} MB, {columns} columns", constants(
                CudaBackend,
                gradient_tile_bytes=megabytes << 20,
                gradient_max_columns=columns,
            )
