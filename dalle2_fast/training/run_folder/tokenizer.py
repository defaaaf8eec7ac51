"""The tokenizer of a run: that of the scenes, or that of the shards, kept in tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

from dalle2_fast.data import BPETokenizer, PairStream, Tokenizer, WordTokenizer, World, tokenizer_from_config
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.recipes import Preset

FILE = "tokenizer.json"  # in the folder of a run on shards


def run_tokenizer(
    preset: Preset, out: Path, shards: str | None, kind: str | None = None, *, use_file: bool = True,
    allow_pipe: bool = False,
) -> Tokenizer:  # fmt: skip
    """The tokenizer of all stages of a run: that of the scenes, or that of the shards (out/tokenizer.json).

    Args:
        preset: names the world of the scenes.
        out: folder of the run.
        shards: what it is trained on instead of scenes.
        kind: "words" or "clip", as asked for. None: what the run has, else words.
        use_file: take out/tokenizer.json if it exists.
        allow_pipe: run the commands of shards that begin with "pipe:".

    Raises:
        ValueError: "clip" without shards, or another kind than the run has.
        TrainingError: tokenizer.json is damaged.
    """
    if kind == "clip" and shards is None:
        raise ValueError("--tokenizer: clip is for captions from --data, expected --data")
    path = Path(out) / FILE
    if use_file and path.exists():
        tokenizer = read_tokenizer(path)
        has = "clip" if isinstance(tokenizer, BPETokenizer) else "words"
        if kind not in (None, has):
            raise ValueError(f"--tokenizer: the run in {out} has {has}, got {kind}")
        return tokenizer
    if shards is None:
        return WordTokenizer.scenes(World(**preset.world))
    if kind == "clip":
        return BPETokenizer()
    return PairStream(shards, 1, allow_pipe=allow_pipe).tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that the file holds. TrainingError if it is damaged."""
    try:
        return tokenizer_from_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrainingError(f"{path}: damaged tokenizer ({type(error).__name__}: {error})") from error
