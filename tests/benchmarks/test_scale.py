"""docs/scale.md: its tables are what the simulator computes, and the simulator counts what happens."""

from __future__ import annotations

import pytest

from benchmarks.scale import report, traffic
from benchmarks.scale.machine import FABRIC, H100, NODE, NVLINK
from benchmarks.scale.networks import FILE, NETWORKS, Cost, costs, count
from benchmarks.scale.workload import stages


def test_the_page_has_the_tables_of_the_simulator():
    """Catches: a table that is older than an assumption, a network or a formula."""
    page = report.PAGE.read_text()
    assert report.filled(page) == page, "python -m benchmarks.scale.report writes the page anew"


@pytest.mark.parametrize("name", ["prior", "CLIP B/32 image"])
def test_the_costs_are_those_of_the_networks(name):
    """Catches: counts that are older than the code of a network. The others take 20 s to count."""
    assert set(costs()) == set(NETWORKS), f"python -m benchmarks.scale.networks writes {FILE}"
    assert count(name) == costs()[name]


def test_the_sizes_are_those_that_the_papers_state():
    """Catches: a misread table of hyperparameters. The bounds are half of the last digit that is printed."""
    billions = {name: stage.trained.parameters / 1e9 for name, stage in stages().items()}
    assert billions["decoder 3.5 B"] == pytest.approx(3.5, abs=0.05)
    assert billions["prior"] == pytest.approx(1.0, abs=0.05)
    assert billions["upsampler 64-256"] == pytest.approx(0.7, abs=0.05)
    assert billions["upsampler 256-1024"] == pytest.approx(0.3, abs=0.05)


def test_the_flops_of_a_transformer_are_those_of_its_formula():
    """Catches: FLOPs counted as multiply-adds, or attention that the counter does not see."""
    width, depth, tokens = 1024, 24, 257
    blocks = depth * (24 * width**2 * tokens + 4 * tokens**2 * width)
    rest = 2 * 256 * 3 * 14**2 * width + 2 * width * 768
    assert costs()["CLIP L/14 image"].flops == pytest.approx(blocks + rest, rel=1e-3)


def ring(chunks: int, world: int) -> tuple[int, list[set[int]]]:
    """Pass `chunks` chunks around a ring until everyone has all; (chunks that each receives, what it has)."""
    has = [{rank} for rank in range(world)]
    last = list(range(world))
    received = 0
    while any(len(each) < chunks for each in has):
        last = [last[rank - 1] for rank in range(world)]
        for rank, chunk in enumerate(last):
            has[rank].add(chunk)
        received += 1
    return received, has


@pytest.mark.parametrize("world", [2, 5, 8, 16])
def test_the_bytes_of_collectives_are_those_of_a_ring_step_by_step(world):
    """Catches: a formula with n in place of n - 1, or an all-reduce that is counted as one gather."""
    received, has = ring(world, world)
    assert all(each == set(range(world)) for each in has)
    total = 1e6
    assert traffic.gather_bytes(total, world) == pytest.approx(received * total / world)
    parameters = total / traffic.GRADIENT
    assert traffic.ddp(parameters, world).moved == pytest.approx(2 * received * total / world)
    assert traffic.fsdp(parameters, world).moved == pytest.approx(traffic.ddp(parameters, world).moved)
    chunk = 2 * 4 * 32  # bytes of the texts of one GPU: 4 pairs of width 32
    assert traffic.ring_loss(4 * world, 32, world, 1e12).moved == pytest.approx(3 * received * chunk)
    if world <= NODE or world % NODE == 0:
        assert traffic.hsdp(parameters, NODE).moved == traffic.fsdp(parameters, NODE).moved


def test_the_slower_link_counts():
    """Catches: bits taken for bytes, or the port of one GPU for those of a node."""
    assert traffic.gather_seconds(8e9, 8) == pytest.approx(7e9 / NVLINK)
    assert traffic.gather_seconds(8e9, 1024) == pytest.approx(8e9 * 127 / 128 / (8 * FABRIC))


def test_more_gpus_divide_the_work_and_not_the_traffic():
    """Catches: a batch that grows with the GPUs, or communication that is hidden twice."""
    stage = stages()["prior"]
    eight, many = (traffic.compute_seconds(stage, world, H100.flops) for world in (8, 1024))
    assert sum(eight) == pytest.approx(128 * sum(many))
    way = traffic.Parallel(0.0, 3 * many[0], 5 * many[1])
    left = traffic.exposed_seconds(stage, 1024, H100.flops, way)
    assert left == pytest.approx(2 * many[0] + 4 * many[1])
    assert stage.embedded().flops == stage.flops - stage.frozen_image
    assert isinstance(stage.trained, Cost) and stage.embedded().trained is stage.trained
