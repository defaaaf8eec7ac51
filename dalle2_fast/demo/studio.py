"""Studio: what the page does with a pipeline, from the values of its fields to pictures with captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dalle2_fast.demo import fields
from dalle2_fast.demo.components import Components
from dalle2_fast.demo.fields import FieldError
from dalle2_fast.demo.uploads import read_image, read_painting

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dalle2_fast.demo.worker import Job
    from dalle2_fast.pipeline.context import Generation
    from dalle2_fast.pipeline.dalle2 import DALLE2

    Draw = Callable[[Job], "Drawing"]

MAX_NUMBER = 16  # pictures or frames of one click
MAX_STEPS = 100
MAX_GUIDANCE = 10.0
SHOWN_SIDE = 256  # pixels of a picture of the decoder's size


@dataclass
class Drawing:
    """What one click made.

    Args:
        pictures: of one size.
        captions: what stands under each.
        seconds: stage -> seconds.
        seeds: one that alone makes each picture again; none where pictures belong together.
        note: a sentence about the result.
    """

    pictures: list[Image]
    captions: list[str]
    seconds: Mapping[str, float]
    seeds: list[int] = field(default_factory=list)
    note: str = ""


class Studio:
    """The methods are what the tabs of the page do, one each.

    A method checks the values of its fields, and raises FieldError at once for one that it cannot use. It
    returns a function that draws for a job, see `Worker`. `settings` are the fields that tabs share: number,
    seed, size, steps and guidance; None is a random seed, the largest size, the checkpoint's value.

    Args:
        pipe: the pipeline.
        batch_size: at most so many images at a time.
        preview: whether to show x0 of every step, for which a GPU cannot replay the steps as CUDA graphs.
    """

    def __init__(self, pipe: DALLE2, *, batch_size: int | None = None, preview: bool = True) -> None:
        self.pipe, self.batch_size, self.preview = pipe, batch_size, preview
        self.components = Components(pipe)

    def draw(self, caption: str, **settings: Any) -> Draw:
        """Pictures of a caption."""
        self._check_caption("caption", caption)
        seeds, options = _shared(settings)

        def work(job: Job) -> Drawing:
            # One prompt for each picture, so that every picture has a seed that alone makes it again.
            captions = [caption] * len(seeds)
            return _pictures(self.pipe.generate(captions, 1, **options, **self._watched(job)), seeds, caption)

        return work

    def variations(self, image: Any, eta: float = 1.0, **settings: Any) -> Draw:
        """Other pictures with the content of one."""
        square = read_image("image", image)
        eta = fields.number("eta", eta, 0, 1)
        seeds, options = _shared(settings)

        def work(job: Job) -> Drawing:
            images = square.expand(len(seeds), -1, -1, -1)
            return _pictures(self.pipe.variations(images, 1, eta=eta, **options, **self._watched(job)), seeds)

        return work

    def inpaint(self, painting: Any, caption: str, resample: int = 1, **settings: Any) -> Draw:
        """Draw the painted part of a picture anew; without a caption the kept part decides."""
        image, mask = read_painting("painting", painting)
        caption = self._optional_caption("caption", caption)
        seeds, options = _shared(settings)
        options["resample"] = fields.whole_number("resample", resample, 1, 10)

        def work(job: Job) -> Drawing:
            images, masks = (rows.expand(len(seeds), -1, -1, -1) for rows in (image, mask))
            captions = None if caption is None else [caption] * len(seeds)
            made = self.pipe.inpaint(images, masks, captions, 1, **options, **self._watched(job))
            return _pictures(made, seeds, caption or "")

        return work

    def interpolate(
        self, first: Any, second: Any, noise: str = "fixed", inversion_steps: int = 50, **settings: Any
    ) -> Draw:
        """The pictures between two; `number` is that of the frames."""
        ends = read_image("first", first), read_image("second", second)
        seeds, options = _shared(settings, low=2)
        steps = fields.whole_number("inversion_steps", inversion_steps, 2, MAX_STEPS)
        options |= {"noise": noise, "inversion_steps": steps, "seed": seeds[0]}

        def work(job: Job) -> Drawing:
            made = self.pipe.interpolate(*ends, len(seeds), **options, **self._watched(job))
            return _frames(made, 1.0, "" if noise == "slerp" else _one_seed(seeds))

        return work

    def text_diff(
        self,
        image: Any,
        source: str,
        target: str,
        theta: float = 0.35,
        inversion_steps: int = 50,
        **settings: Any,
    ) -> Draw:
        """Change a picture by the difference of two captions; `number` is that of the frames."""
        square = read_image("image", image)
        self._check_caption("source", source)
        self._check_caption("target", target)
        if source.split() == target.split():
            expected = "expected a caption that differs from that of the picture"
            raise FieldError("target", f"{expected}, got {target!r} twice")
        theta = fields.number("theta", theta, 0, 1)
        seeds, options = _shared(settings, low=2)
        steps = fields.whole_number("inversion_steps", inversion_steps, 2, MAX_STEPS)
        options |= {"theta": theta, "inversion_steps": steps, "seed": seeds[0]}

        def work(job: Job) -> Drawing:
            made = self.pipe.text_diff(square, source, target, len(seeds), **options, **self._watched(job))
            return _frames(made, theta, "All pictures start from the noise that was found for the image.")

        return work

    def invert(
        self, image: Any, caption: str, steps: int = 50, guidance: float = 1.0, refine: int = 0
    ) -> Draw:
        """The noise of a picture, and what is sampled from it."""
        square = read_image("image", image)
        options: dict[str, Any] = dict(
            prompt=self._optional_caption("caption", caption),
            steps=fields.whole_number("steps", steps, 2, MAX_STEPS),
            guidance=fields.number("guidance", guidance, 0, MAX_GUIDANCE),
        )
        refine = fields.whole_number("refine", refine, 0, 5)

        def work(job: Job) -> Drawing:
            from dalle2_fast.evaluation.psnr import psnr

            watched = self._watched(job)
            shared = {name: watched[name] for name in ("batch_size", "progress")}
            pair = self.pipe.invert(square, refine=refine, **options, **shared)
            size = self.pipe.decoder.image_size
            made = self.pipe.decode(pair.image_embed, x_T=pair.x_T, size=size, seed=0, **options, **watched)
            noise = pair.x_T.float()
            # Of the noise [0, 1] is three standard deviations to either side.
            shown = (pair.image, noise / 6 + 0.5, made.images)
            pictures = [_enlarged(_to_pil(images)[0]) for images in shown]
            captions = [
                "source", f"noise, deviation {noise.std():.2f}",
                f"sampled from the noise, {psnr(made.images, pair.image)[0]:.1f} dB",
            ]  # fmt: skip
            return Drawing(pictures, captions, pair.seconds | made.seconds)

        return work

    def reconstruct(self, image: Any, dims: str, fit: int = 512, **settings: Any) -> Draw:
        """A picture from the first components of its embedding."""
        square = read_image("image", image)
        counts = fields.whole_numbers("dims", dims, 0, self.pipe.clip.dim_latent)
        if len(counts) > MAX_NUMBER:
            raise FieldError("dims", f"expected at most {MAX_NUMBER} numbers, got {len(counts)}")
        fit = fields.whole_number("fit", fit, 2, 20_000)
        self.components.check("image")
        seeds, options = _shared(settings | {"number": 1})
        options["seed"] = seeds[0]

        def work(job: Job) -> Drawing:
            pca, seconds = self.components.fit(job, fit)
            made = self.pipe.reconstruct(square, counts, pca, **options, **self._watched(job))
            captions = [f"{count}: {pca.explained(count):.1%} of variance" for count in counts]
            return Drawing(_to_pil(made.images), captions, seconds | made.seconds, note=_one_seed(seeds))

        return work

    def _check_caption(self, name: str, caption: str | None) -> None:
        """FieldError for a caption that the tokenizer refuses, in the words of the command line."""
        if not (caption or "").strip():
            raise FieldError(name, "expected words, got an empty caption")
        if len(caption) > fields.MAX_LETTERS:
            expected = f"expected a caption of at most {fields.MAX_LETTERS} letters"
            raise FieldError(name, f"{expected}, got {len(caption)}")
        try:
            self.pipe.tokenizer.encode([caption])
        except ValueError as error:
            raise FieldError(name, str(error)) from None

    def _optional_caption(self, name: str, caption: str | None) -> str | None:
        if not (caption or "").strip():
            return None
        self._check_caption(name, caption)
        return caption

    def _watched(self, job: Job) -> dict[str, Any]:
        callback = job.callback if self.preview else None
        return {"batch_size": self.batch_size, "progress": job.progress, "callback": callback}


def _shared(settings: Mapping[str, Any], low: int = 1) -> tuple[list[int], dict[str, Any]]:
    """The seeds of the pictures, and the options of the call."""
    count = fields.whole_number("number", settings["number"], low, MAX_NUMBER)
    seed = fields.seed_of("seed", settings.get("seed"), count)
    steps, guidance = settings.get("steps"), settings.get("guidance")
    if steps is not None:
        steps = fields.whole_number("steps", steps, 1, MAX_STEPS)
    if guidance is not None:
        guidance = fields.number("guidance", guidance, 0, MAX_GUIDANCE)
    seeds = [seed + index for index in range(count)]
    return seeds, {"seed": seeds, "size": settings.get("size"), "steps": steps, "guidance": guidance}


def _pictures(made: Generation, seeds: Sequence[int], caption: str = "") -> Drawing:
    """One picture for each seed."""
    pictures = _to_pil(made.images)
    for picture, seed in zip(pictures, seeds, strict=True):
        picture.info |= {"caption": caption, "seed": str(seed)}  # written into the PNG file
    return Drawing(pictures, [f"seed {seed}" for seed in seeds], made.seconds, list(seeds))


def _frames(made: Generation, theta: float, note: str) -> Drawing:
    """Pictures of angles from 0 to theta."""
    pictures = _to_pil(made.images)
    captions = [f"theta {theta * index / (len(pictures) - 1):.2f}" for index in range(len(pictures))]
    return Drawing(pictures, captions, made.seconds, note=note)


def _one_seed(seeds: Sequence[int]) -> str:
    return f"All pictures start from the noise of seed {seeds[0]}."


def _to_pil(images: Tensor) -> list[Image]:
    from dalle2_fast.data.images import to_pil

    return to_pil(images.cpu())


def _enlarged(image: Image) -> Image:
    from PIL import Image as pillow

    factor = max(1, SHOWN_SIDE // image.width)
    return image.resize((image.width * factor, image.height * factor), pillow.Resampling.NEAREST)
