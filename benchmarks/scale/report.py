"""The tables of docs/scale.md.

    python -m benchmarks.scale.report            writes them into docs/scale.md
    python -m benchmarks.scale.report --print    prints them

Each table stands between <!-- scale:NAME --> and <!-- scale:end -->; the text around them is written by hand.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.scale import traffic
from benchmarks.scale.machine import H100, H200, MFU, NODE, WORLD_SIZES, nodes
from benchmarks.scale.memory import SAVED, STATE, checkpoint, micro_batch, state_bytes, update_seconds
from benchmarks.scale.networks import CLIPS, costs
from benchmarks.scale.workload import (
    BYTES_256,
    BYTES_1024,
    CAPTION_BYTES,
    EMBEDDING_BYTES,
    Stage,
    stages,
)

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
PEAK = H100.flops  # that of the H200, too
DAY = 86400.0
LOCAL = 512  # pairs on each GPU where the batch grows with the GPUs
WIDTHS = {"H/16": 1024, "L/14": 768, "B/32": 512}
WAYS = {
    "gather, local product (ours)": traffic.gathered_loss,
    "gather, global product": traffic.global_loss,
    "ring of GPUs": traffic.ring_loss,
    "gather in the node, ring of nodes": traffic.node_ring_loss,
}


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def number(value: float) -> str:
    """Three digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{value:e}".split("e")[1]))
    return f"{value:,.{digits}f}"


def with_embedded() -> list[Stage]:
    """Each stage, and those with precomputed embeddings after them."""
    found: list[Stage] = []
    for stage in stages().values():
        found += [stage, stage.embedded()] if stage.frozen_image else [stage]
    return found


def sample() -> str:
    """What a sample of each stage costs."""
    heads = ("stage", "parameters, 10^9", "forward, GFLOP", "training, GFLOP", "of it frozen CLIP",
             "activations, MB", "read, kB", "tokens", "batch", "steps", "sizes from")  # fmt: skip
    rows = (
        (
            stage.name,
            number(stage.trained.parameters / 1e9),
            number(stage.trained.flops / 1e9),
            number(stage.flops / 1e9),
            f"{(stage.frozen_image + stage.frozen_text) / stage.flops:.0%}",
            number(stage.trained.activations / 1e6),
            number(stage.sample_bytes / 1e3),
            stage.tokens,
            f"{stage.batch:,}",
            f"{stage.steps:,.0f}",
            stage.source,
        )
        for stage in with_embedded()
    )
    return table(heads, rows)


def whole() -> str:
    """The whole training of each stage."""
    heads = ("stage", "samples, 10^9", "epochs of 0.25 / 0.65 / 2 x 10^9", "10^21 FLOP", "GPU days",
             "days on 64 / 256 / 1024 GPUs")  # fmt: skip
    rows = []
    for stage in with_embedded():
        seen = stage.batch * stage.steps
        seconds = sum(traffic.compute_seconds(stage, 1, PEAK)) * stage.steps
        rows.append(
            (
                stage.name,
                number(seen / 1e9),
                " / ".join(number(seen / size) for size in (0.25e9, 0.65e9, 2e9)),
                number(stage.flops * seen / 1e21),
                f"{seconds / DAY:,.0f}",
                " / ".join(number(seconds / DAY / world) for world in (64, 256, 1024)),
            )
        )
    return table(heads, rows)


def data() -> str:
    """Bytes of the data."""
    heads = ("pairs", "256 px, TB", "1024 px, TB", "image embeddings, TB", "both embeddings and captions, TB",
             "text encodings, TB")  # fmt: skip
    encodings = 77 * 768 * 2
    each = (BYTES_256, BYTES_1024, EMBEDDING_BYTES, 2 * EMBEDDING_BYTES + CAPTION_BYTES, encodings)
    rows = (
        (f"{pairs / 1e9:g} x 10^9", *(number(pairs * size / 1e12) for size in each))
        for pairs in (0.25e9, 0.65e9, 2e9)
    )
    return table(heads, rows)


def steps() -> str:
    """A step of each stage by the number of GPUs, at least one sample for each."""
    heads = ("stage", "GPUs", "samples per GPU", "compute, ms", "samples/s", "10^6 tokens/s",
             "read, MB/s per node", "received, GB", "DDP, ms (exposed)", "FSDP, ms (exposed)",
             "HSDP, ms (exposed)", "computing, DDP / FSDP")  # fmt: skip
    rows = []
    chosen = [stage for stage in with_embedded() if "decoder" not in stage.name or "embed" not in stage.name]
    for stage in chosen:
        for world in (world for world in WORLD_SIZES if world <= stage.batch):
            seconds = sum(traffic.compute_seconds(stage, world, PEAK))
            rate = stage.batch / seconds
            ways = [way(stage.trained.parameters, world) for way in (traffic.ddp, traffic.fsdp, traffic.hsdp)]
            exposed = [traffic.exposed_seconds(stage, world, PEAK, way) for way in ways]
            values = (stage.batch / world, 1e3 * seconds, rate, rate * stage.tokens / 1e6,
                      rate * stage.sample_bytes / nodes(world) / 1e6, ways[0].moved / 1e9)  # fmt: skip
            pairs = zip(ways, exposed, strict=True)
            times = (f"{number(1e3 * way.seconds)} ({number(1e3 * left)})" for way, left in pairs)
            shares = (
                f"{seconds / (seconds + left + update_seconds(stage, H100, shards)):.0%}"
                for left, shards in ((exposed[0], 1), (exposed[1], world))
            )
            rows.append((stage.name, world, *map(number, values), *times, " / ".join(shares)))
    return table(heads, rows)


def memory() -> str:
    """What fills a GPU."""
    heads = ("stage", "state, DDP / FSDP 8 / FSDP 128, GB", "activations of a sample, GB",
             "largest micro-batch on 80 GB, DDP / FSDP 8 / FSDP 128", "on 141 GB",
             "update, DDP, H100 / H200, ms")  # fmt: skip
    shards = (1, 8, 128)
    rows = (
        (
            stage.name,
            " / ".join(number(state_bytes(stage, count) / 1e9) for count in shards),
            number(stage.trained.activations / 1e9),
            *(" / ".join(str(micro_batch(stage, gpu, count)) for count in shards) for gpu in (H100, H200)),
            " / ".join(number(1e3 * update_seconds(stage, gpu, 1)) for gpu in (H100, H200)),
        )
        for stage in stages().values()
    )
    return table(heads, rows)


def tower_seconds(name: str, batch: float, world: int) -> float:
    """Both towers of a CLIP, forward and backward, on each GPU."""
    flops = sum(costs()[f"CLIP {name} {side}"].flops for side in ("image", "text"))
    return 3 * flops * batch / world / (PEAK * MFU)


def loss() -> str:
    """The contrastive loss of CLIP ViT-H/16: a batch of 32,768, and one of 512 pairs per GPU."""
    heads = ("batch", "GPUs", "towers, ms", "way", "received, MB", "wire, ms", "products, ms", "held, MB",
             "loss / towers")  # fmt: skip
    rows = []
    for world in (8, 128, 1024):
        for batch in (32768, LOCAL * world):
            towers = tower_seconds("H/16", batch, world)
            for way, of in WAYS.items():
                cost = of(batch, WIDTHS["H/16"], world, PEAK)
                share = loss_seconds(way, cost) / towers
                values = (cost.moved / 1e6, 1e3 * cost.wire, 1e3 * cost.product, cost.bytes_held / 1e6)
                cells = (number(1e3 * towers), way, *map(number, values), f"{share:.1%}")
                rows.append((f"{batch:,}", world, *cells))
    return table(heads, rows)


def loss_seconds(way: str, cost: traffic.Exchange) -> float:
    """A ring computes one chunk while the next one travels; after a gather the products wait for it."""
    return max(cost.wire, cost.product) if "ring" in way else cost.wire + cost.product


def limits() -> str:
    """The number of GPUs from which the loss takes more than a tenth of the time of the towers."""
    heads = ("CLIP", "batch", *WAYS)
    rows = []
    for name in CLIPS:
        batches = {f"{LOCAL} per GPU": lambda world: LOCAL * world, "32,768": lambda _: 32768}
        for text, batch_of in batches.items():
            cells = (limit(name, batch_of, way) for way in WAYS)
            rows.append((name, text, *cells))
    return table(heads, rows)


def limit(name: str, batch_of: Callable[[int], int], way: str) -> str:
    """The first power of two, from 8 to 32,768 GPUs (one pair for each), beyond a tenth."""
    for power in range(3, 16):
        world = 2**power
        cost = WAYS[way](batch_of(world), WIDTHS[name], world, PEAK)
        if loss_seconds(way, cost) > 0.1 * tower_seconds(name, batch_of(world), world):
            return f"{world:,} GPUs"
    return "none"


def checkpoints() -> str:
    """Checkpoints with the whole state."""
    heads = ("stage", "GB", "per GPU of 8 / 128 / 1024, GB", "copied to the host, s", "written, s")
    rows = []
    for stage in stages().values():
        each = [checkpoint(stage, world) for world in (NODE, 128, 1024)]
        per_gpu = [each[0].total / world / 1e9 for world in (NODE, 128, 1024)]
        columns = (per_gpu, [one.stall for one in each], [one.written for one in each])
        cells = (" / ".join(map(number, column)) for column in columns)
        rows.append((stage.name, number(each[0].total / 1e9), *cells))
    return table(heads, rows)


TABLES = {
    "sample": sample, "whole": whole, "data": data, "steps": steps, "memory": memory, "loss": loss,
    "limits": limits, "checkpoints": checkpoints,
}  # fmt: skip


def filled(page: str) -> str:
    """The page with every table as it is computed now. KeyError if it lacks one."""
    for name, make in TABLES.items():
        begin, end = f"<!-- scale:{name} -->", "<!-- scale:end -->"
        place, text = re.compile(f"{begin}(?:(?!<!--).)*{end}", re.DOTALL), f"{begin}\n\n{make()}\n\n{end}"
        page, found = place.subn(lambda _, text=text: text, page)
        if found != 1:
            raise KeyError(f"{PAGE}: expected one place for the table {name}, found {found}")
    return page


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--print", action="store_true", dest="only_print", help="print, and write nothing")
    if parser.parse_args().only_print:
        print("\n\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()))
        return
    PAGE.write_text(filled(PAGE.read_text()))
    print(f"{PAGE} ({STATE} bytes of state and {SAVED} of a checkpoint for each parameter)")


if __name__ == "__main__":
    main()
