"""GenerationContext: what the stages of one call share, a seed for every image, batches and the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dalle2_fast.diffusion.graphs.cache import StageGraphs
from dalle2_fast.pipeline.compilation.graphs import graphs_of
from dalle2_fast.pipeline.like_diffusers.offload import resident
from dalle2_fast.pipeline.parts import PARTS
from dalle2_fast.pipeline.progress import Progress, StageTimer, StepCallback
from dalle2_fast.pipeline.settings import check_count
from dalle2_fast.seeds import sample_seed

if TYPE_CHECKING:
    from dalle2_fast.pipeline.dalle2 import DALLE2

STAGES = ("text", "prior", "decoder", "upsampler", "upsampler2")  # a stage's position derives its seeds
IMAGE_STAGES = STAGES[2:]


@dataclass
class Generation:
    """What a call of the pipeline made: B = P * N rows, N images of each of P inputs, input after input.

    Args:
        images: float32 [B, 3, size, size] in [0, 1]; with output_type "np" or "pil" what `convert_images`
            makes of it.
        low_res: float32 [B, 3, S, S] in [0, 1], the decoder's output.
        image_embed: [B, D], the prior's output, or what the decoder was given.
        seed: the seed of the call, or one of each prompt.
        sample_seeds: int64 [B], the seed of each row.
        seconds: stage -> wall-clock seconds.
        graphs: stage -> "captured" or "replayed", or why its steps ran without CUDA graphs; empty where there
            are none or none were wanted.
    """

    images: Tensor
    low_res: Tensor
    image_embed: Tensor
    seed: int | tuple[int, ...]
    sample_seeds: Tensor
    seconds: dict[str, float] = field(default_factory=dict)
    graphs: dict[str, str] = field(default_factory=dict)


class GenerationContext:
    """One call of the pipeline, with one row per image.

    Args:
        pipe: the pipeline.
        seed: the seed of the call, or one of each input, for its result.
        sample_seeds: one seed per row; rows of one input are next to each other.
        batch_size: at most so many rows run at a time; None is all of them.
        progress: see StageTimer.
        graphs: whether steps are replayed as CUDA graphs, see `check_graphs`.
        callback: see `DALLE2.generate`.

    Raises:
        TypeError, ValueError: batch_size is no int of at least 1, progress is neither a bool nor a callable,
            or callback is no callable.
    """

    def __init__(
        self,
        pipe: DALLE2,
        seed: int | tuple[int, ...],
        sample_seeds: Sequence[int],
        *,
        batch_size: int | None = None,
        progress: Progress = False,
        graphs: bool | str = "auto",
        callback: StepCallback | None = None,
    ) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")
        self.pipe, self.seed, self.sample_seeds = pipe, seed, list(sample_seeds)
        self.batch_size = batch_size if batch_size is None else check_count("batch_size", batch_size)
        self.timer, self.callback = StageTimer(progress, pipe.device), callback
        self.graphs, self.graphs_required = graphs_of(pipe, graphs), graphs is True
        self.graph_outcomes: dict[str, str] = {}

    @classmethod
    def for_inputs(
        cls,
        pipe: DALLE2,
        inputs: int,
        num_images: int,
        *,
        candidates: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: Progress = False,
        graphs: bool | str = "auto",
        callback: StepCallback | None = None,
    ) -> GenerationContext:
        """`num_images` images of each input, and `candidates` rows for each image.

        Image i of an input has a seed that depends on (seed of the input, i) only. A single seed is that of
        every input.
        """
        check_count("num_images", num_images)
        seed = resolve_seeds(seed, inputs, generator)
        rows: list[int] = []
        for of_input in seed if isinstance(seed, tuple) else (seed,) * inputs:
            for index in range(num_images):
                rows += candidate_seeds(sample_seed(of_input, index), candidates)
        shared: dict[str, Any] = dict(progress=progress, graphs=graphs, callback=callback)
        return cls(pipe, seed, rows, batch_size=batch_size, **shared)

    @property
    def batches(self) -> list[slice]:
        """The rows of each batch."""
        rows = len(self.sample_seeds)
        step = self.batch_size or max(1, rows)
        return [slice(start, start + step) for start in range(0, rows, step)]

    def repeat(self, inputs: Tensor) -> Tensor:  # [P, *] -> [B, *]
        """One row for each image, from one row for each input."""
        return inputs.repeat_interleave(len(self.sample_seeds) // len(inputs), dim=0)

    def select(self, rows: Tensor) -> None:  # int64 [R]
        """Continue with these rows only."""
        self.sample_seeds = [self.sample_seeds[row] for row in rows.tolist()]

    def evaluation_mode(self) -> AbstractContextManager[None]:
        """`with context.evaluation_mode():` runs the pipeline's modules in evaluation mode."""
        return evaluation_mode(self.pipe)

    def sample(
        self, stage: str, sample: Callable[..., Tensor], *, diffuses: bool = True, **options: Any
    ) -> Tensor:
        """sample(seeds=..., **options) of all rows; `stage` is one of STAGES. Otherwise as `run`.

        diffuses: whether the stage is a diffusion, whose steps may be replayed as CUDA graphs.
        """
        # With the same seeds all stages would start from the same noise.
        seeds = [sample_seed(seed, STAGES.index(stage)) for seed in self.sample_seeds]
        options["seeds"] = torch.tensor(seeds, device=self.pipe.device)
        if self.callback is not None and stage in IMAGE_STAGES:
            follow = self.callback
            options["callback"] = lambda step, _, x0: follow(stage, step, ((x0 + 1) / 2).clamp(0, 1))
        if self.graphs is None:
            return self.run(stage, sample, **options)
        graphs = StageGraphs(self.graphs, stage, self.graphs_required)
        if diffuses:
            options["graphs"] = graphs
        result = self.run(stage, sample, **options)
        self.graph_outcomes[stage] = graphs.outcome
        return result

    def run(self, stage: str, function: Callable[..., Tensor], **options: Any) -> Tensor:
        """function(**options, progress=...) batch after batch, timed as `stage`; results as one tensor.

        Tensors among the options have one row per image and are cut into batches. FloatingPointError, before
        the next batch, if a result is not finite.
        """
        results = []
        part = stage if stage in PARTS else "decoder"  # of the inversion
        with self.timer(stage, len(self.batches)) as track, resident(self.pipe, part):
            for rows in self.batches:
                inputs = {k: v[rows] if isinstance(v, Tensor) else v for k, v in options.items()}
                shown = track if self.timer.progress else None
                results.append(check_finite(stage, function(**inputs, progress=shown), self.pipe.dtype))
            return torch.cat(results)

    def result(self, images: Tensor, low_res: Tensor, image_embed: Tensor) -> Generation:
        """The result of the call."""
        return Generation(
            images=images.float(),
            low_res=low_res.float(),
            image_embed=image_embed,
            seed=self.seed,
            sample_seeds=torch.tensor(self.sample_seeds),
            seconds=self.timer.seconds,
            graphs=self.graph_outcomes,
        )


def check_finite(stage: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that a stage computed in `dtype`; FloatingPointError, naming the stage, if not finite."""
    if not torch.isfinite(values).all():
        hint = ": use float32 or bfloat16" if dtype == torch.float16 else "; are the weights damaged?"
        raise FloatingPointError(f"{stage}: the result is not finite in {dtype}{hint}")
    return values


def resolve_seed(seed: int | None, generator: torch.Generator | None = None) -> int:
    """`seed`, or one drawn from `generator`, or else from torch's global generator.

    Raises:
        TypeError: `seed` is no int, or `generator` no generator.
        ValueError: `seed` is not in 0 ... 2^63 - 1, or both are given.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        came = type(generator).__name__
        raise TypeError(
            f"generator: expected one torch.Generator, got {came}; seed takes one seed for each prompt"
        )
    if seed is None:
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**32, (), generator=generator, device=device))
    if generator is not None:
        raise ValueError("seed, generator: expected at most one of the two")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 ... 2^63 - 1, got {seed}")
    return seed


def resolve_seeds(
    seed: int | Sequence[int] | None, inputs: int, generator: torch.Generator | None = None
) -> int | tuple[int, ...]:
    """`resolve_seed` of one seed, or of one for each input.

    Raises:
        TypeError, ValueError: as `resolve_seed`; and if there is another number of seeds than of inputs.
    """
    if not isinstance(seed, (list, tuple)):
        return resolve_seed(seed, generator)
    if len(seed) != inputs:
        raise ValueError(f"seed: expected one, or one per prompt = {inputs}, got {len(seed)}")
    for each in seed:
        if each is None:
            raise TypeError("seed: expected ints, got None among them")
    return tuple(resolve_seed(each, generator) for each in seed)


def candidate_seeds(seed: int, count: int) -> list[int]:
    """The seeds of an image's candidates: the image's seed first, then seeds derived from it.

    More candidates never change the first ones. Derivation uses negative positions, so that no candidate has
    the seed of a stage.
    """
    return [seed, *(sample_seed(seed, -candidate) for candidate in range(1, count))]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is as before, because a trainer may be sampling."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True
