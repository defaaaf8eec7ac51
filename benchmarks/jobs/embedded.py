"""A training step of prior and decoder with and without precomputed embeddings.

    python -m benchmarks.jobs.embedded [--steps 6] [--batch-size 64]

The CLIP of the package, the networks of the preset scenes-gpu with initial weights, pictures as in
benchmarks/jobs/loader.py, one thread, no background processes. `batch` is reading and decoding, `loss` the
loss and its gradient; the optimiser, which does not depend on embeddings, is left out. Both kinds take turns,
step by step, on the same samples; the values are medians. `embed_samples_per_s` is the rate of `dalle2-fast
embed` on the same pictures. The result is benchmarks/results/embedded.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.jobs.loader import write_data
from benchmarks.timing.provenance import machine, save, versions
from dalle2_fast import DALLE2
from dalle2_fast.cli import main as command
from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.presets import get_preset
from dalle2_fast.training.recipes import adjust
from dalle2_fast.training.stages.registry import make_stage
from dalle2_fast.training.weights import save_weights


def prepare(root: Path) -> tuple[Path, Path, Path]:
    """Data, a run that has a finished CLIP, and the embeddings."""
    data, run = root / "data", root / "run"
    data.mkdir()
    write_data(data, 1)
    pipe = DALLE2.from_pretrained(device="cpu", dtype="fp32")
    (run / "clip").mkdir(parents=True)
    save_weights(run / "clip" / "model.safetensors", {"model": pipe.clip.config}, pipe.clip.state_dict())
    (run / "tokenizer.json").write_text(json.dumps(pipe.tokenizer.to_config()))
    return data, run, root / "embeddings"


def measure(name: str, data: Path, run: Path, embeddings: Path, batch_size: int, steps: int) -> dict:
    """Milliseconds of a stage, medians over steps."""
    from dalle2_fast.training.run_folder.tokenizer import read_tokenizer

    preset = adjust(get_preset("scenes-gpu"), (name,), batch_size=batch_size)
    stages = {
        kind: make_stage(
            name, preset, out=run, seed=0, device=torch.device("cpu"), shards=str(data),
            tokenizer=read_tokenizer(run / "tokenizer.json"), execution=Execution(embeddings=path),
        )
        for kind, path in (("computed", None), ("precomputed", embeddings))
    }  # fmt: skip
    times: dict[str, dict[str, list[float]]] = {kind: {"batch": [], "loss": []} for kind in stages}
    losses = {}
    for kind in stages:
        stages[kind].fit()
    for step in range(steps + 1):
        for kind, stage in stages.items():
            began = time.perf_counter()
            batch = stage.batch(step)
            read = time.perf_counter()
            loss = stage.loss(batch, torch.Generator().manual_seed(step))
            loss.backward()
            ended = time.perf_counter()
            stage.model.zero_grad()
            losses[kind] = loss.item()
            if step:  # the first one is slower
                times[kind]["batch"].append(read - began)
                times[kind]["loss"].append(ended - read)
    if abs(losses["computed"] - losses["precomputed"]) > 1e-2 * abs(losses["computed"]):
        raise RuntimeError(f"{name}: the losses differ: {losses}")
    found = {
        kind: {part: round(1000 * statistics.median(values), 1) for part, values in parts.items()}
        for kind, parts in times.items()
    }
    totals = {kind: sum(parts.values()) for kind, parts in found.items()}
    return found | {"computed / precomputed": round(totals["computed"] / totals["precomputed"], 2)}


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {"machine": machine(), "versions": versions()} | vars(args)
    with tempfile.TemporaryDirectory() as folder:
        data, run, embeddings = prepare(Path(folder))
        began = time.perf_counter()
        words = ["embed", str(data), str(embeddings), "--checkpoint", str(run), "--device", "cpu", "--quiet"]
        if command(words):
            raise RuntimeError("embed has failed")
        result["embed_samples_per_s"] = round(1000 / (time.perf_counter() - began), 1)
        for name in ("prior", "decoder"):
            result[f"{name}_ms"] = measure(name, data, run, embeddings, args.batch_size, args.steps)
    print(json.dumps(result, indent=1))
    print(save("embedded", result))


if __name__ == "__main__":
    main()
