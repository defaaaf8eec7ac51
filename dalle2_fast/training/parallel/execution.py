"""How a training step is carried out: none of these options changes its result by more than rounding.

Nothing here imports torch, so that `dalle2-fast train --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class Execution:
    """Options of a step on one or many processes.

    Args:
        parallel: what many processes share. "ddp": each has the whole model. "fsdp": each has a part of the
            weights, of their average and of the optimiser's state.
        shard_size: of "fsdp", the number of processes over which one copy of the model is divided; groups of
            this size are replicas (HSDP). None: all processes.
        accumulate: number of micro-batches into which each process divides its rows of the batch.
        clip_chunk: rows of a process that CLIP's towers see at a time, see `two_passes`. None: all at once.
        checkpoint_activations: compute the activations of a block again in the backward pass instead of
            keeping them.
        compile: compile each block with torch.compile.
        keep: how many states of many processes are kept.
        workers: processes, for each process of the training, that read and decode data in advance.
        allow_pipe: whether data may be the output of commands (pipe:).
        embeddings: folder of embeddings of the images, which prior and decoder read instead of computing them
            in every step. None: they compute them.
        sample_prompts: file of captions, one per line, of which the decoder's validation draws images.

    Raises:
        ValueError: an option is out of range, or does not fit another one.
    """

    parallel: str = "ddp"
    shard_size: int | None = None
    accumulate: int = 1
    clip_chunk: int | None = None
    checkpoint_activations: bool = False
    compile: bool = False
    keep: int = 2
    workers: int = 0
    allow_pipe: bool = False
    embeddings: Path | None = None
    sample_prompts: Path | None = None

    def __post_init__(self) -> None:
        if self.parallel not in PARALLEL:
            raise ValueError(f"--parallel: expected one of {', '.join(PARALLEL)}, got {self.parallel!r}")
        for name in ("shard_size", "accumulate", "clip_chunk", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
        if self.workers < 0:
            raise ValueError(f"--workers: expected at least 0, got {self.workers}")
        if self.shard_size is not None and self.parallel != "fsdp":
            raise ValueError(f"--shard-size: is for --parallel fsdp, got {self.parallel}")


PLAIN = Execution()
