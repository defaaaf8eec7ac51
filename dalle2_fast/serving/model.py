"""ImageModel: checks a request against the pipeline, and draws a batch of pictures."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from dalle2_fast.seeds import mix_seed
from dalle2_fast.serving.batching import Abandoned, Picture
from dalle2_fast.serving.errors import ApiError
from dalle2_fast.serving.fields import Edits, Fields, Generations, Variations
from dalle2_fast.serving.image_bytes import decode_upload
from dalle2_fast.serving.limits import Limits

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dalle2_fast.pipeline.dalle2 import DALLE2

SOLID = 128  # an edit repaints where alpha is below


class Settings(NamedTuple):
    """What pictures of one batch have in common."""

    kind: type[Fields]
    size: int
    steps: int
    guidance: float
    negative_prompt: str | None


class Inputs(NamedTuple):
    """What one picture is made of."""

    prompt: str | None = None
    image: Tensor | None = None  # [1, 3, S, S]
    mask: Tensor | None = None  # bool [1, 1, S, S], True = repaint


class ImageModel:
    """A pipeline, as a server uses it.

    Args:
        pipe: the pipeline.
        limits: of requests and of batches.
        graphs: as in DALLE2.generate.
        on_stage: is called with (stage, seconds) after each batch.
    """

    def __init__(
        self,
        pipe: DALLE2,
        limits: Limits,
        *,
        graphs: bool | str = "auto",
        on_stage: Callable[[str, float], None] = lambda stage, seconds: None,
    ) -> None:
        self.pipe, self.limits, self.graphs, self.on_stage = pipe, limits, graphs, on_stage

    def prepare(self, fields: Fields, files: Mapping[str, bytes]) -> list[Picture]:
        """The pictures of a request, after every check that needs no computation of the networks.

        Args:
            fields: of the request.
            files: the uploaded files, by field.

        Raises:
            ApiError: 400 for anything that the pipeline cannot do.
        """
        limits = self.limits
        for name, most in (("n", limits.max_images), ("steps", limits.max_steps)):
            value = getattr(fields, name)
            if value is not None and value > most:
                raise ApiError(400, f"{name}: expected at most {most}, got {value}", param=name)
        settings = self._settings(fields)
        inputs = self._inputs(fields, files, settings.size)
        seed = secrets.randbelow(2**32) if fields.seed is None else fields.seed
        return [Picture(settings, inputs, each) for each in picture_seeds(seed, fields.n)]

    def capacity(self, settings: Settings) -> int:
        """Pictures of a batch: a picture of a caption has several candidates, which are drawn together."""
        candidates = 1 if settings.kind is Variations else self.pipe.sampling["candidates"]
        return max(1, self.limits.max_batch // candidates)

    def draw(
        self, settings: Settings, inputs: list[Inputs], seeds: list[int], abandoned: Callable[[], bool]
    ) -> list[Image]:
        """One picture of each of the inputs. Abandoned if abandoned() becomes true between two steps."""
        import torch

        from dalle2_fast.data.images import to_pil

        def watched(stage: str, steps: Iterable, total: int | None) -> Iterator:
            for step in steps:
                if abandoned():
                    raise Abandoned
                yield step

        # On a GPU a callback would keep the steps from being replayed as CUDA graphs.
        on_cpu = self.pipe.device.type == "cpu"
        options: dict[str, Any] = dict(
            seed=seeds, size=settings.size, steps=settings.steps, guidance=settings.guidance,
            batch_size=self.limits.max_batch, progress=watched if on_cpu else False, graphs=self.graphs,
        )  # fmt: skip
        if settings.kind is Variations:
            images = torch.cat([each.image for each in inputs])
            made = self.pipe.variations(images, 1, **options)
        else:
            prompts = [each.prompt for each in inputs]
            options["negative_prompt"] = settings.negative_prompt
            if settings.kind is Edits:
                images, masks = (torch.cat([each[place] for each in inputs]) for place in (1, 2))
                made = self.pipe.inpaint(images, masks, prompts, 1, **options)
            else:
                made = self.pipe.generate(prompts, 1, **options)
        for stage, seconds in made.seconds.items():
            self.on_stage(stage, seconds)
        return to_pil(made.images)

    def _settings(self, fields: Fields) -> Settings:
        """The settings, each of which the pipeline accepts."""
        from dalle2_fast.pipeline.settings import resolve_settings
        from dalle2_fast.pipeline.stages import check_candidates, check_prior

        pipe = self.pipe
        size = _side(fields.size, pipe.sizes)
        negative_prompt = getattr(fields, "negative_prompt", None)
        try:
            given = dict(steps=fields.steps, guidance=fields.guidance, negative_prompt=negative_prompt)
            chosen = resolve_settings(pipe, size, **given)
            if isinstance(fields, Generations):
                check_prior(pipe)
                check_candidates(pipe, chosen.candidates)
        except ValueError as error:  # begins with the name of the setting
            param = str(error).partition(":")[0]
            known = type(fields).model_fields
            raise ApiError(400, str(error), param=param if param in known else None) from None
        for name in ("prompt", "negative_prompt"):
            caption = getattr(fields, name, None)
            if caption is not None:
                try:
                    pipe.tokenizer.encode([caption])
                except ValueError as error:
                    raise ApiError(400, f"{name}: {error}", param=name, code="invalid_prompt") from None
        # The resolved values, so that a request that names the default shares a batch with one that does not.
        return Settings(type(fields), size, chosen.steps, chosen.guidance, negative_prompt)

    def _inputs(self, fields: Fields, files: Mapping[str, bytes], size: int) -> Inputs:
        prompt = getattr(fields, "prompt", None)
        if not type(fields).files:
            return Inputs(prompt)
        from dalle2_fast.data.images import from_pil, is_transparent, resized, resized_mask

        if "image" not in files:
            raise ApiError(400, "image: expected a file, got none", param="image")
        image = decode_upload(files["image"], "image", self.limits.max_pixels)
        # Images are made small at once, so that a long queue holds no large ones.
        if isinstance(fields, Variations):
            return Inputs(image=resized(from_pil(image), self.pipe.clip.image_size))
        source = image
        if "mask" in files:
            source = decode_upload(files["mask"], "mask", self.limits.max_pixels)
            if source.size != image.size:
                sizes = f"{image.width} x {image.height}, got {source.width} x {source.height}"
                raise ApiError(400, f"mask: expected the size of the image, {sizes}", param="mask")
        mask = _transparent(source)
        if mask is None:
            expected = "expected an image with transparency, which is where to repaint, got an opaque one"
            raise ApiError(400, f"mask: {expected}", param="mask")
        if is_transparent(image):  # from_pil would lay it on white; what is to stay keeps its colour
            image = image.convert("RGBA").convert("RGB")
        return Inputs(prompt, resized(from_pil(image), size), resized_mask(mask, size))


def picture_seeds(seed: int, count: int) -> list[int]:
    """The seeds of the pictures of a request: its own one first, then others derived from it.

    Each of them alone makes its picture again. They have 53 bits, which JavaScript keeps exactly.

    Example:
        >>> picture_seeds(7, 3)[0], picture_seeds(7, 3)[:2] == picture_seeds(7, 2)
        (7, True)
    """
    return [seed, *(mix_seed(seed, index) >> 10 for index in range(1, count))]


def _side(text: str, sizes: tuple[int, ...]) -> int:
    known = {f"{side}x{side}": side for side in sizes} | {"auto": sizes[-1]}
    if text not in known:
        expected = ", ".join(known)
        raise ApiError(400, f"size: expected one of {expected}, got {text[:40]!r}", param="size")
    return known[text]


def _transparent(image: Image) -> Tensor | None:
    """bool [1, 1, S, S], True where an image is transparent; None if it is so nowhere."""
    import numpy as np
    import torch

    from dalle2_fast.data.images import is_transparent

    if not is_transparent(image):
        return None
    alpha = np.array(image.convert("RGBA").getchannel("A"))
    mask = torch.from_numpy(alpha)[None, None] < SOLID
    return mask if mask.any() else None
