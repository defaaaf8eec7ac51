"""`dalle2-fast embed DATA OUT`: CLIP's embeddings of image-caption pairs, in the layout of clip-retrieval."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dalle2_fast.cli import arguments
from dalle2_fast.cli.bulk.agreement import agree_on_record
from dalle2_fast.cli.bulk.processes import Process
from dalle2_fast.cli.image_files import check_writable

if TYPE_CHECKING:
    import torch

    from dalle2_fast.data.text.tokenizer import Tokenizer
    from dalle2_fast.embeddings.compute import Embedder
    from dalle2_fast.models.clip.model import CLIP

PRECISIONS = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}  # of autocast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast embed`."""
    add = parser.add_argument
    add("data", metavar="DATA", help="pairs, as for train --data: local tar shards, folders, ...")
    add(
        "out",
        type=Path,
        metavar="OUT",
        help="folder: img_emb/, text_emb/ (.npy) and metadata/ (.parquet), one file of each per shard; the "
        "same command goes on with it, and torchrun may start it as several processes",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="the CLIP of a pipeline, or of a run of train (default: of the pipeline in the package)",
    )
    which.add_argument(
        "--clip",
        type=Path,
        metavar="PATH",
        help="a CLIP alone: a file or folder of OpenAI, open_clip or Hugging Face; captions are read as "
        "CLIP's byte pairs",
    )
    add(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="dtype of the files (default float16)",
    )
    add(
        "--precision",
        choices=tuple(PRECISIONS),
        default="fp32",
        help="of the computation (default fp32); bf16, fp16: autocast",
    )
    add(
        "--batch-size",
        type=arguments.positive_int,
        default=256,
        metavar="N",
        help="samples at a time (default 256)",
    )
    add(
        "--threads",
        type=arguments.positive_int,
        default=4,
        metavar="N",
        help="threads that decode images (default 4)",
    )
    add("--device", default="auto", help=arguments.DEVICE_HELP)
    arguments.add_json(parser)
    add("--quiet", action="store_true", help="no progress bar, no lines about samples that are skipped")


class Encoder(NamedTuple):
    """A CLIP with its tokenizer, and where they were found."""

    clip: CLIP
    tokenizer: Tokenizer
    name: str


def run(args: argparse.Namespace) -> int:
    """Embed what the folder lacks; the exit code."""
    from dalle2_fast.data.sources import StreamedNames, open_source
    from dalle2_fast.embeddings.folder import RECORD, describe_source, import_parquet, is_complete

    began, process = time.perf_counter(), Process.current()
    import_parquet()
    check_writable(args.out / f"{RECORD}.{process.rank}", "OUT")
    device = process.device(args.device)
    source = open_source(args.data, rank=process.rank, world_size=process.count)
    if isinstance(source, StreamedNames):
        raise ValueError(
            "DATA: expected data that can be read at any place, such as local tar shards, not compressed; "
            "got streamed shards"
        )
    if not sum(source.counts):
        raise ValueError(f"DATA: {args.data}: expected pairs of image and caption, got none")
    encoder = _load(args, device)
    record = _record(args, encoder) | describe_source(source)
    agree_on_record(args.out / RECORD, record, "OUT")

    parts = len(source.counts)
    mine = process.share(range(parts))
    left = [part for part in mine if not is_complete(args.out, part, parts)]
    embedder = _embedder(args, encoder)
    written, skipped = _write(embedder, source, left, args, show=process.is_first and not args.quiet)
    if skipped and not args.quiet:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        print(f"embed: skipped {skipped.total()} samples: {counts}", file=sys.stderr)
    seconds = time.perf_counter() - began
    if args.json:
        facts = {
            "folder": str(args.out.resolve()),
            "samples": written,
            "parts_made": len(left),
            "parts_were_there": len(mine) - len(left),
            "process": process.rank,
            "processes": process.count,
            "clip": record["clip"],
            "width": record["width"],
            "device": str(device),
            "seconds": seconds,
        }
        print(json.dumps(facts))
        return 0
    lines = {
        "embeddings": f"{args.out.resolve()} ({written:,} samples in {len(left)} parts made, "
        f"{len(mine) - len(left)} parts were there)",
        "process": f"{process.rank} of {process.count}" if process.count > 1 else None,
        "clip": f"{encoder.name} ({record['clip'][:12]}), width {record['width']}",
        "device": str(device),
        "seconds": f"{seconds:.2f}",
    }
    for name, value in lines.items():
        if value is not None:
            print(f"{name + ':':<12}{value}")
    return 0


def _load(args: argparse.Namespace, device: torch.device) -> Encoder:
    """The CLIP that is asked for. ValueError if it lacks a tower."""
    encoder = _open(args)
    clip = encoder.clip
    if clip.visual is None or clip.config["text_enc_depth"] is None:
        missing = "image" if clip.visual is None else "text"
        raise ValueError(f"{encoder.name}: expected a CLIP with both towers, got none for the {missing}")
    return encoder._replace(clip=clip.to(device).eval())


def _open(args: argparse.Namespace) -> Encoder:
    from dalle2_fast.checkpoints import construct, open_checkpoint
    from dalle2_fast.data import BPETokenizer, tokenizer_from_config
    from dalle2_fast.models.clip.model import CLIP

    if args.clip is not None:
        clip = CLIP.from_pretrained(args.clip)
        tokenizer = BPETokenizer(clip.config["text_seq_len"])
        if clip.config["num_text_tokens"] != tokenizer.vocab_size:
            raise ValueError(
                f"--clip: {args.clip}: expected a vocabulary of {tokenizer.vocab_size:,} byte pairs, got "
                f"{clip.config['num_text_tokens']:,} tokens; --checkpoint reads a tokenizer, too"
            )
        return Encoder(clip, tokenizer, str(args.clip))
    if args.checkpoint is not None and (args.checkpoint / "clip" / "model.safetensors").is_file():
        return _of_run(args.checkpoint)
    checkpoint = open_checkpoint(args.checkpoint, ["clip"])
    config = {"tokenizer": checkpoint.config.get("tokenizer")}
    if checkpoint.config.get("model") != "DALLE2":
        raise ValueError(
            f"--checkpoint: {checkpoint.path}: expected a pipeline, got {checkpoint.config.get('model')!r}"
        )
    tokenizer = construct(tokenizer_from_config, config, "tokenizer", checkpoint.path)
    import torch

    clip = checkpoint.make({"clip": CLIP}, torch.device("cpu"), torch.float32)["clip"]
    return Encoder(clip, tokenizer, str(checkpoint.path))


def _of_run(folder: Path) -> Encoder:
    """The finished CLIP of a run of training: its weights are those that later stages of the run see."""
    from dalle2_fast.checkpoints import construct, load_config
    from dalle2_fast.data import tokenizer_from_config
    from dalle2_fast.models.clip.model import CLIP
    from dalle2_fast.training.run_folder.tokenizer import FILE, read_tokenizer
    from dalle2_fast.training.stages.finished import load_finished

    clip = load_finished(folder, "clip", (CLIP,))
    if (folder / FILE).is_file():
        tokenizer = read_tokenizer(folder / FILE)
    elif (folder / "config.json").is_file():
        tokenizer = construct(tokenizer_from_config, load_config(folder), "tokenizer", folder)
    else:
        raise ValueError(
            f"--checkpoint: {folder}: its CLIP was trained on rendered scenes and has no {FILE}: expected a "
            "run on --data, or a finished pipeline"
        )
    return Encoder(clip, tokenizer, str(folder / "clip"))


def _record(args: argparse.Namespace, encoder: Encoder) -> dict:
    """What all parts have in common."""
    from dalle2_fast.embeddings.fingerprint import fingerprint
    from dalle2_fast.embeddings.folder import FORMAT_VERSION
    from dalle2_fast.training.run_folder.record import describe_tokenizer

    return {
        "format_version": FORMAT_VERSION,
        "clip": fingerprint(encoder.clip),
        "tokenizer": describe_tokenizer(encoder.tokenizer),
        "width": encoder.clip.dim_latent,
        "image_size": encoder.clip.image_size,
        "dtype": args.dtype,
        "precision": args.precision,
        "normalized": True,
    }


def _embedder(args: argparse.Namespace, encoder: Encoder) -> Embedder:
    import torch

    from dalle2_fast.embeddings.compute import Embedder

    precision = PRECISIONS[args.precision]
    return Embedder(
        encoder.clip,
        encoder.tokenizer,
        batch_size=args.batch_size,
        threads=args.threads,
        autocast=None if precision is None else getattr(torch, precision),
    )


def _write(
    embedder: Embedder, source, parts: list[int], args: argparse.Namespace, *, show: bool
) -> tuple[int, Counter[str]]:
    """Embed and write parts; (samples with an embedding, reasons of the others)."""
    from tqdm import tqdm

    from dalle2_fast.embeddings.compute import write_part

    written, skipped = 0, Counter()
    total = sum(source.counts[part] for part in parts)
    with tqdm(total=total, unit="sample", disable=not show or sys.stderr is None) as bar:
        for part in parts:
            found = embedder.shard(source, part, bar.update)
            width = embedder.clip.dim_latent
            write_part(args.out, part, len(source.counts), found, width, args.dtype)
            written += len(found.rows)
            skipped.update(complaint.reason for complaint in found.skipped)
    return written, skipped
