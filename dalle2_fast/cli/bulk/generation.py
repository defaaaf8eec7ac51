"""`dalle2-fast generate --prompts FILE --output DIR`: pictures of many captions, over processes, resumable.

Picture k is image k mod N of caption k div N, N = --num-images. Its seed is mix_seed(--seed, caption, image):
it depends on neither the batch nor the process. `generate CAPTION --num-images 1 --seed SEED` makes the same
picture, up to rounding.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle2_fast import __version__
from dalle2_fast.cli.arguments import given_decoder_options, given_settings
from dalle2_fast.cli.bulk.agreement import agree_on_record
from dalle2_fast.cli.bulk.processes import Process
from dalle2_fast.cli.bulk.prompts import check_prompts, read_prompts
from dalle2_fast.cli.bulk.results import RECORD, Files, Picture, key_of, open_shard, recorded_seed
from dalle2_fast.cli.checks.request import check_request
from dalle2_fast.cli.image_files import check_writable
from dalle2_fast.pipeline.device import choose_dtype
from dalle2_fast.seeds import mix_seed

if TYPE_CHECKING:
    from dalle2_fast.data.text.tokenizer import Tokenizer
    from dalle2_fast.pipeline.dalle2 import DALLE2

BATCH_SIZE = 16  # images at a time, candidates included, if --batch-size is not given
ONE_CAPTION = ("init_image", "strength", "individual", "quality")  # options of `generate CAPTION` alone


def run(args: argparse.Namespace) -> int:
    """Generate what the folder lacks; the exit code."""
    began, process = time.perf_counter(), Process.current()
    folder = _check(args, process)
    check_request(args, given_settings(args))
    device = process.device(args.device)
    dtype = choose_dtype(args.dtype, device)
    prompts = read_prompts(args.prompts)
    checkpoint, tokenizer = _read_tokenizer(args.checkpoint)
    check_prompts(prompts, tokenizer, args.prompts)

    from dalle2_fast.pipeline.compilation.graphs import check_graphs
    from dalle2_fast.pipeline.dalle2 import DALLE2
    from dalle2_fast.pipeline.settings import resolve_settings, resolve_size
    from dalle2_fast.pipeline.stages import check_candidates, check_prior

    graphs = "auto" if args.graphs is None else args.graphs
    check_graphs(graphs, device, "--graphs")
    pipe = DALLE2.from_pretrained(args.checkpoint, device=device, dtype=dtype)
    if args.compile is not None:
        pipe.compile(args.compile)
    given, decoder_options = given_settings(args), given_decoder_options(args)
    size = resolve_size(pipe, given.pop("size"))
    settings = resolve_settings(pipe, size, **given)
    check_prior(pipe, **{name: given[name] for name in ("prior_steps", "prior_guidance_interval")})
    check_candidates(pipe, settings.candidates)
    count = args.num_images or 1
    seed = _seed(args.seed, folder, process)
    record = {
        "checkpoint": checkpoint,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "captions": len(prompts),
        "num_images": count,
        "shard_size": args.shard_size,
        "seed": seed,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "compile": args.compile,
        "settings": settings.to_dict() | decoder_options,
    }
    agree_on_record(folder / RECORD, record, "--output")
    job = Generation(
        pipe, prompts, count, record,
        batch_size=args.batch_size or BATCH_SIZE,
        options=given | decoder_options | {"size": size, "graphs": graphs},
    )  # fmt: skip
    made, there = _write(job, folder, process, show=process.is_first and not args.quiet)
    _report(
        {
            "folder": str(folder.resolve()),
            "made": made,
            "were_there": there,
            "process": process.rank,
            "processes": process.count,
            "seed": record["seed"],
            "device": str(device),
            "dtype": record["dtype"],
            "seconds": time.perf_counter() - began,
        },
        as_json=args.json,
    )
    return 0


def _check(args: argparse.Namespace, process: Process) -> Path:
    """The folder of the results; ValueError or OSError for options that cannot be used together."""
    given = [name for name in ONE_CAPTION if getattr(args, name) is not None]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise ValueError(f"{option}: is for a single caption, expected none together with --prompts")
    if args.output is None:
        raise ValueError("--output: expected a folder for the pictures of --prompts, got none")
    if str(args.prompts) == "-" and process.count > 1:
        raise ValueError("--prompts: expected a file, because each process reads it, got standard input")
    if args.output.exists() and not args.output.is_dir():
        raise NotADirectoryError(f"--output: {args.output} is not a folder")
    check_writable(args.output / f"{key_of(0)}.{process.rank}.png", "--output")
    return args.output


def _seed(given: int | None, folder: Path, process: Process) -> int:
    """The seed as given, else the recorded one, else a random one, which one process alone can draw."""
    seed = recorded_seed(folder) if given is None else given
    if seed is None and process.count > 1:
        raise ValueError(f"--seed: expected one, because {process.count} processes share it, got none")
    return secrets.randbelow(2**32) if seed is None else seed


def _read_tokenizer(path: Path | None) -> tuple[str, Tokenizer]:
    """What identifies the checkpoint, and its tokenizer, of which the weights are not needed."""
    from dalle2_fast.checkpoints import construct, embedded_path, load_config, open_checkpoint
    from dalle2_fast.data import tokenizer_from_config

    folder = embedded_path() if path is None else path
    if (folder / "config.json").is_file() and not (folder / "model_index.json").exists():
        config = load_config(folder)
    else:  # of another project: its tokenizer is found together with its layout
        config = open_checkpoint(path, ["clip"]).config
    return config.get("weights_sha256") or str(folder), construct(
        tokenizer_from_config, config, "tokenizer", folder
    )


class Generation:
    """Makes the pictures of all captions, any of them at any time.

    Args:
        pipe: the pipeline.
        prompts: the captions.
        count: images of each caption.
        record: what all pictures have in common.
        batch_size: images at a time, candidates included.
        options: of DALLE2.generate.
    """

    def __init__(
        self,
        pipe: DALLE2,
        prompts: Sequence[str],
        count: int,
        record: dict[str, Any],
        *,
        batch_size: int,
        options: dict[str, Any],
    ) -> None:
        self.pipe, self.prompts, self.count, self.record = pipe, prompts, count, record
        self.batch_size, self.options = batch_size, options
        self.total = len(prompts) * count
        # Candidates are rows of the batch, of which one is kept.
        self.at_once = max(1, batch_size // record["settings"]["candidates"])

    def batches(self, numbers: Sequence[int]) -> Iterator[list[tuple[int, Picture]]]:
        """The pictures with these numbers in batches of (number, files)."""
        from dalle2_fast.data.images import to_pil

        rest = iter(numbers)
        while batch := list(islice(rest, self.at_once)):
            places = [divmod(number, self.count) for number in batch]
            captions = [self.prompts[caption] for caption, _ in places]
            seeds = [mix_seed(self.record["seed"], *place) for place in places]
            made = self.pipe.generate(
                captions, 1, seed=seeds, batch_size=self.batch_size, progress=False, **self.options
            )
            pictures = map(self._files, captions, seeds, to_pil(made.images))
            yield list(zip(batch, pictures, strict=True))

    def _files(self, caption: str, seed: int, image: Any) -> Picture:
        png = io.BytesIO()
        image.save(png, format="PNG")
        facts = {
            "caption": caption,
            "seed": seed,
            "width": image.width,
            "height": image.height,
            "sha256": hashlib.sha256(png.getvalue()).hexdigest(),
            "settings": self.record["settings"],
            "checkpoint": self.record["checkpoint"],
            "dtype": self.record["dtype"],
            "software": f"dalle2_fast {__version__}",
        }
        return {
            "png": png.getvalue(),
            "txt": caption.encode(),
            "json": json.dumps(facts, ensure_ascii=False).encode(),
        }


def _write(job: Generation, folder: Path, process: Process, *, show: bool) -> tuple[int, int]:
    """Make and write this process's share; (pictures made, pictures that were there)."""
    from tqdm import tqdm

    shard_size = job.record["shard_size"]
    size = shard_size or job.at_once
    parts = [range(first, min(first + size, job.total)) for first in range(0, job.total, size)]
    share = process.share(list(enumerate(parts)))
    mine, made = sum(len(numbers) for _, numbers in share), 0
    with tqdm(total=mine, unit="image", disable=not show or sys.stderr is None) as bar:
        for number, numbers in share:
            part = open_shard(folder, number, numbers) if shard_size else nullcontext(Files(folder, numbers))
            with part as results:
                missing = [] if results is None else list(results.missing)
                bar.update(len(numbers) - len(missing))
                for batch in job.batches(missing):
                    results.add(batch)
                    made += len(batch)
                    bar.update(len(batch))
    return made, mine - made


def _report(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    lines = {
        "pictures": f"{facts['folder']} ({facts['made']} made, {facts['were_there']} were there)",
        "process": f"{facts['process']} of {facts['processes']}" if facts["processes"] > 1 else None,
        "seed": facts["seed"],
        "device": f"{facts['device']}, {facts['dtype']}",
        "seconds": f"{facts['seconds']:.2f}",
    }
    for name, value in lines.items():
        if value is not None:
            print(f"{name + ':':<12}{value}")
