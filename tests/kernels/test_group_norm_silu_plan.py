"""How group_norm_silu cuts a tensor: which kernels are launched, and that their tiles cover every slab."""

from __future__ import annotations

import pytest
import torch

from tests.support.norm_cases import BF16, FP32, NCHW, NHWC

pytest.importorskip("triton")


@pytest.fixture
def plan(kernel_device):
    from dalle2_fast.kernels.group_norm_silu import _plan

    return _plan


def test_launches(kernel_device):
    # Catches: a model's shape that fell off its path. One launch is 1 read and 1 write.
    from dalle2_fast.kernels.group_norm_silu import backward as group_norm_silu_backward
    from dalle2_fast.kernels.group_norm_silu import forward as group_norm_silu
    from tests.support.aot.cases_group_norm_silu import launches

    def names(channels, side, layout=NCHW, dtype=BF16):
        x = torch.empty(2, channels, side, side, dtype=dtype, device="meta").to(memory_format=layout)
        weight, statistics = torch.empty(channels, device="meta"), torch.empty(2, 32, device="meta")
        film = torch.empty(2, channels, device="meta")
        forward = launches(group_norm_silu._forward, x, 32, weight, weight, 1e-5, film, film, True)
        backward = launches(
            group_norm_silu_backward._backward,
            x, x, statistics, statistics, weight, weight, film, film, True, True,
        )  # fmt: skip
        return [
            [launch.name.removesuffix("_kernel").strip("_") for launch in found]
            for found in (forward, backward)
        ]

    for channels, side in [(320, 64), (640, 32), (960, 16), (1280, 8), (2560, 8), (1920, 16)]:
        one = ["looped"] if side == 64 else ["resident"]
        assert names(channels, side, dtype=FP32)[0] == one, (channels, side)
        forward, backward = names(channels, side)
        assert forward == one, (channels, side)
        assert backward in (["resident_backward", "parameters"], ["looped_backward", "parameters"])
    assert names(320, 256) == [["moments", "apply"], ["sums", "input_gradient", "parameters"]]
    for channels, side in [(960, 16), (1920, 16), (1280, 8), (2560, 8)]:
        assert names(channels, side, NHWC)[0] == ["resident"], (channels, side)
    for channels, side in [(320, 32), (640, 32), (960, 32), (1280, 32), (1600, 32), (2240, 16)]:
        assert names(channels, side, NHWC)[0] == ["looped"], (channels, side)
    assert names(320, 64, NHWC)[0] == ["moments", "apply"]


def test_every_plan_covers_its_slab(plan):
    # Catches: tiles that leave something out, masks left out where there is padding, limits not kept.
    hypothesis = pytest.importorskip("hypothesis")
    numbers = hypothesis.strategies

    @hypothesis.settings(max_examples=100, deadline=None)
    @hypothesis.given(
        width=numbers.integers(1, 300), count=numbers.sampled_from([1, 2, 3, 7, 8, 32]),
        length=numbers.sampled_from([1, 2, 15, 49, 64, 77, 256, 1000, 4096, 65536]),
        adjacent=numbers.booleans(), itemsize=numbers.sampled_from([2, 4]),
    )  # fmt: skip
    def check(width, count, length, adjacent, itemsize):
        shape = (width, count, length, adjacent, itemsize)
        twice = plan.FORWARD_LANES, plan.FORWARD_WARPS
        found = [
            (plan.resident_tiles(*shape, plan.RESIDENT_LANES), plan.RESIDENT_LANES),
            (plan.forward_tiles(*shape, *twice, plan.FORWARD_MAX_LANES), None),
            (plan.chunk_tiles(*shape, plan.CHUNK_LANES, plan.CHUNK_WARPS), None),
            (plan.chunk_tiles(*shape, plan.SUM_LANES, plan.SUM_WARPS, True), None),
        ]
        for tiles, most in found:
            if tiles is None:
                continue
            for size in (tiles.channels, tiles.positions, tiles.warps):
                assert size == plan.power_of_two(size)
            covered = tiles.groups * width
            assert tiles.groups <= count and (tiles.groups == 1 or tiles.channel_tiles == 1)
            assert tiles.channels * tiles.channel_tiles >= covered
            assert tiles.positions * tiles.position_tiles >= length
            if tiles.exact:
                assert tiles.channels * tiles.channel_tiles == covered and count % tiles.groups == 0
                assert tiles.positions * tiles.position_tiles == length
            if most is not None:
                assert tiles.lanes <= most and tiles.count <= plan.RESIDENT_TILES
            else:
                assert tiles.channels * tiles.positions <= plan.FORWARD_LANES
        pieces, each = plan.chunks(tiles.count, count, torch.device("meta"), plan.MAX_CHUNKS, adjacent)
        assert (pieces - 1) * each < tiles.count <= pieces * each and pieces <= plan.MAX_CHUNKS

    check()
