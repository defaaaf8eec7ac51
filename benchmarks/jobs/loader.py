"""Samples per second of PairStream and of webdataset's pipelines, and what a training step waits for data.

    python -m benchmarks.jobs.loader [--samples 3000] [--rounds 3] [--workers 2]

Every run is a separate process that reads the same shards: JPEG pictures of 256 pixels, smooth noise of
quality 90, in shards of 1000 as img2dataset writes them. All implementations crop, reduce to 64 pixels and
tokenize by the same functions. `webdataset` is its pipeline with a DataLoader as in its documentation,
`open_clip` the one of open_clip_train.data.get_wds_dataset, written with webdataset's public API; both with
their usual shuffle buffers. The time to the first batch (listing the shards, starting processes, filling
buffers) is counted apart from the rate, and so is the time to the first batch of a run that is resumed after
half of the data. The lists of shards are made anew in each run. `step` is one step of CLIP of the preset
scenes-cpu with one thread, on a batch that lies ready and on those of a PairStream. In every round the
implementations take turns; the best of the rounds counts. The result is benchmarks/results/loader.json.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.timing.provenance import ROOT, machine, save, versions
from dalle2_fast.data import PairStream, WordTokenizer
from dalle2_fast.data.images import to_square

RESOLUTION, BATCH, SIDE, PER_SHARD = 64, 64, 256, 1000
TOKENIZER = WordTokenizer(["picture", *map(str, range(1000))])


def write_data(folder: Path, shards: int) -> None:
    """Shards of PER_SHARD pictures."""
    draw = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(PER_SHARD):
                coarse = Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8))
                file = io.BytesIO()
                coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                for ending, data in (("jpg", file.getvalue()), ("txt", f"picture {number}".encode())):
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def stream(data: Path, workers: int) -> PairStream:
    return PairStream(data, BATCH, (RESOLUTION,), tokenizer=TOKENIZER, workers=workers)


def ours(data: Path, workers: int, begin: int) -> Iterator[int]:
    pairs = stream(data, workers)
    try:
        for step in itertools.count(begin):
            yield len(pairs.batch(step)["tokens"])
    finally:
        pairs.close()


def ours_in_threads(data: Path, workers: int, begin: int) -> Iterator[int]:
    """The same rows, made by threads of this process instead of other processes."""
    for rows in in_threads(stream(data, 0), workers, begin):
        yield len(rows["tokens"])


def in_threads(pairs: PairStream, workers: int, begin: int = 0) -> Iterator[dict]:
    pairs.batch(begin)
    maker, parts = pairs._maker, []
    maker.threads = 1
    with ThreadPoolExecutor(workers) as pool:
        for step in itertools.count(begin):
            while len(parts) < 2 * workers:
                parts.append(pool.submit(maker.rows, *pairs._spans(step + len(parts))[0]))
            yield pairs._batch([parts.pop(0).result()])


def image_of(image: Image.Image) -> torch.Tensor:
    return to_square(image, RESOLUTION).float() / 255


def tokens_of(text: str) -> torch.Tensor:
    return TOKENIZER.encode([text], unknown="token", truncate=True)[0]


def webdataset(data: Path, workers: int, begin: int) -> Iterator[int]:
    import webdataset as wds

    shards = sorted(map(str, data.glob("*.tar")))
    pipeline = (
        wds.WebDataset(shards, shardshuffle=100, seed=0, resampled=False)
        .shuffle(1000).decode("pil").to_tuple("jpg", "txt").map_tuple(image_of, tokens_of).batched(BATCH)
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(pipeline.repeat(), batch_size=None, num_workers=workers)
    for _, tokens in itertools.islice(loader, begin, None):
        yield len(tokens)


def open_clip(data: Path, workers: int, begin: int) -> Iterator[int]:
    import webdataset as wds

    shards = sorted(map(str, data.glob("*.tar")))
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.detshuffle(bufsize=2000, initial=500, seed=0),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.select(lambda sample: "txt" in sample and "jpg" in sample),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=image_of, text=tokens_of),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    )
    loader = wds.WebLoader(
        pipeline.repeat(), batch_size=None, shuffle=False, num_workers=workers, persistent_workers=workers > 0
    )
    for _, tokens in itertools.islice(loader, begin, None):
        yield len(tokens)


LOADERS: dict[str, tuple[Callable, bool]] = {  # and whether it has workers
    "ours, 0 workers": (ours, False),
    "ours": (ours, True),
    "ours in threads": (ours_in_threads, True),
    "webdataset": (webdataset, True),
    "open_clip": (open_clip, True),
}


def measure_rate(name: str, data: Path, workers: int, samples: int, begin: int) -> dict:
    """Seconds to the first batch and, unless it begins in the middle, samples per second after it, and CPU
    time of all processes for each sample, which other load on the machine changes less."""
    torch.set_num_threads(1)
    loader, has_workers = LOADERS[name]
    started, cpu = time.perf_counter(), cpu_seconds()
    batches = loader(data, workers if has_workers else 0, begin)
    next(batches)
    first = time.perf_counter() - started
    if begin:
        return {"first_batch_s": first}
    before = BATCH + sum(next(batches) for _ in range(4))  # those that were prepared meanwhile
    started, found = time.perf_counter(), 0
    while found < samples:
        found += next(batches)
    seconds = time.perf_counter() - started
    batches.close()  # ends the processes, whose time is then known; what they have prepared is not counted
    cpu = cpu_seconds() - cpu
    rates = {"samples_per_s": found / seconds, "cpu_ms_per_sample": 1000 * cpu / (before + found)}
    return {"first_batch_s": first, **rates}


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure_step(name: str, data: Path, workers: int, steps: int) -> dict:
    """Milliseconds of a training step."""
    from dalle2_fast.models import CLIP
    from dalle2_fast.training.presets import get_preset

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = dict(num_text_tokens=TOKENIZER.vocab_size, text_seq_len=TOKENIZER.context_length)
    model = CLIP(**(get_preset("scenes-cpu").clip.model | dict(visual_image_size=RESOLUTION)), **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pairs = stream(data, {"processes": workers}.get(name, 0))
    ready = pairs.batch(0)
    batches = {"ready": itertools.repeat(ready), "threads": in_threads(pairs, workers)}.get(name)
    batches = map(pairs.batch, itertools.count(1)) if batches is None else batches
    times = []
    for _ in range(steps + 3):
        started = time.perf_counter()
        batch = next(batches)
        optimizer.zero_grad()
        model(batch["tokens"], batch["images"][RESOLUTION]).backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return {"step_ms": 1000 * statistics.median(times[3:])}


STEPS = ("ready", "0 workers", "processes", "threads")


def in_a_process(*arguments) -> dict:
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.jobs.loader", "--one", *map(str, arguments)],
            capture_output=True, text=True, cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": cache},
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def best_of(runs: list[dict], digits: int = 3) -> dict:
    """Of each number the best run, because other load on the machine only makes it worse."""
    return {
        key: float(f"{(max if key.endswith('per_s') else min)(run[key] for run in runs):.{digits}g}")
        for key in runs[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.loader", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--one", nargs="+", help="one run in this process; prints its result")
    parser.add_argument("--samples", type=int, default=3000, help="that a rate is measured over")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="kept in the file, e.g. other load on the machine")
    arguments = parser.parse_args()
    if arguments.one:
        kind, name, data, *numbers = arguments.one
        function = {"rate": measure_rate, "step": measure_step}[kind]
        print(json.dumps(function(name, Path(data), *map(int, numbers))))
        return
    rates, resumed, steps = ({name: [] for name in names} for names in (LOADERS, LOADERS, STEPS))
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), arguments.shards)
        half = arguments.shards * PER_SHARD // BATCH // 2
        about = {"machine": machine(), "versions": versions("webdataset", "pillow")}
        for _ in range(arguments.rounds):
            for name, runs in rates.items():
                runs.append(in_a_process("rate", name, folder, arguments.workers, arguments.samples, 0))
                if "threads" not in name:
                    resumed[name].append(in_a_process("rate", name, folder, arguments.workers, 0, half))
            for name, runs in steps.items():
                runs.append(in_a_process("step", name, folder, arguments.workers, 12))
    rows = [
        {"loader": name, "workers": arguments.workers if LOADERS[name][1] else 0, **best_of(runs)}
        | ({"resumed_first_batch_s": best_of(resumed[name])["first_batch_s"]} if resumed[name] else {})
        for name, runs in rates.items()
    ]
    waiting = [{"batches": name, **best_of(runs, 4)} for name, runs in steps.items()]
    settings = dict(side=SIDE, resolution=RESOLUTION, batch=BATCH, samples=arguments.samples,
                    shards=arguments.shards, rounds=arguments.rounds)  # fmt: skip
    about |= {"settings": settings, "note": arguments.note}
    print(save("loader", {**about, "rows": rows, "step": waiting}))
    for row in (*rows, *waiting):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
