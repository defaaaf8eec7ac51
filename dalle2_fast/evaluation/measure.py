"""Everything that `dalle2-fast evaluate` measures, in one JSON-able report."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from dalle2_fast.data.synthetic.captions import make_captions
from dalle2_fast.data.synthetic.rendering import render
from dalle2_fast.data.synthetic.scenes import Scenes, sample_scenes
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.data.text.tokenizer import WordTokenizer
from dalle2_fast.evaluation.amounts import FULL, PARTS, SETTINGS, SPLITS, Amounts
from dalle2_fast.evaluation.baselines import nearest_training_scenes, shuffle_images
from dalle2_fast.evaluation.clip_scores import score_clip
from dalle2_fast.evaluation.denoising import denoise_once
from dalle2_fast.evaluation.outlines import outline_iou, outline_scenes, score_outlines
from dalle2_fast.evaluation.psnr import psnr
from dalle2_fast.evaluation.reading.reader import Reader
from dalle2_fast.evaluation.scores import ATTRIBUTES, Tally, score_captions
from dalle2_fast.evaluation.upsampling import score_upsampler
from dalle2_fast.pipeline.dalle2 import DALLE2
from dalle2_fast.seeds import mix_seed


def evaluate(
    pipe: DALLE2,
    world: World,
    *,
    splits: tuple[str, ...] = SPLITS,
    parts: tuple[str, ...] = PARTS,
    amounts: Amounts = FULL,
    seed: int = 0,
    settings: dict | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> dict:
    """Measure a pipeline: its CLIP, what its images show of their captions, its upsampler and its decoder.

    Args:
        pipe: to be measured.
        world: of the scenes that it was trained on.
        splits: some of SPLITS. comp: scenes with the held-out pairs of shape and colour.
        parts: some of PARTS.
        amounts: how much is measured.
        seed: of scenes, captions and noise.
        settings: some of SETTINGS by name; the others are the pipeline's defaults.
        batch_size: captions in a call of the pipeline. They share their noise, so scores of larger batches
            are less certain.
        progress: draw a progress bar.

    Returns:
        JSON-able: what was measured, on what and how, and "clip" and "caption_accuracy" by split,
        "upsampler", "outline_scores", "denoising", "seconds" by part.
    """
    sampling = pipe.sampling | (settings or {})
    generate = partial(_generate, pipe, sampling=sampling, batch_size=batch_size, progress=progress)
    report = {
        "world": world.to_config(),
        "splits": list(splits),
        **amounts._asdict(),
        "seed": seed,
        "sampling": sampling,
        "size": pipe.decoder.image_size,
        "batch_size": batch_size,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": _versions(),
        "clip": {},
        "caption_accuracy": {},
        "upsampler": None,
        "outline_scores": None,
        "denoising": None,
        "seconds": {},
    }
    for split in splits:
        if "clip" in parts:
            with _timed(report, f"clip {split}"):
                report["clip"][split] = _to_json(_score_clip(pipe, world, split, amounts, seed))
        if "captions" in parts:
            with _timed(report, f"captions {split}"):
                scores = _score_images(generate, world, split, amounts, seed, pipe.decoder.image_size)
                report["caption_accuracy"][split] = _to_json(scores)
    if "upsampler" in parts and pipe.upsampler is not None:
        with _timed(report, "upsampler"):
            report["upsampler"] = _score_upsampler(pipe, world, amounts, seed, sampling)
    if "outlines" in parts:
        with _timed(report, "outlines"):
            report["outline_scores"] = score_outlines(
                generate,
                world,
                per_shape=amounts.outlines,
                resolution=pipe.decoder.image_size,
                generator=_generator(seed, "iid", "outlines"),
                seed=mix_seed(seed, len(SPLITS)),
            )
    if "denoising" in parts:
        with _timed(report, "denoising"):
            report["denoising"] = _score_denoising(pipe, world, amounts, seed)
    return report


# ------------------------------------------------------------------------------------------------- the parts


def _score_clip(pipe: DALLE2, world: World, split: str, amounts: Amounts, seed: int) -> dict:
    """{"retrieval": {name: Tally}, "two_way": {name: Tally}}, see `score_clip`."""

    def encode_text(tokens: Tensor, batch_size: int = 256) -> Tensor:
        rows = pipe.tokenizer.encode(_texts(tokens)).to(pipe.device).split(batch_size)
        return torch.cat([pipe.clip.encode_text(part)[0].float().cpu() for part in rows])

    def encode_image(images: Tensor, batch_size: int = 128) -> Tensor:
        rows = images.to(pipe.device, pipe.dtype).split(batch_size)
        return torch.cat([pipe.clip.encode_image(part).float().cpu() for part in rows])

    generator = _generator(seed, split, "clip")
    return score_clip(
        encode_image,
        encode_text,
        sample_scenes(amounts.clip_captions, generator, split, world),
        world=world,
        split=split,
        resolution=pipe.clip.image_size,
        generator=generator,
    )


def _score_images(
    generate: Callable[[Tensor, int], Tensor],  # captions as scene tokens, seed -> images
    world: World,
    split: str,
    amounts: Amounts,
    seed: int,
    size: int,  # of the renders that the images are compared with
) -> dict[str, dict[str, dict[str, Tally]]]:
    """{source: {kind: {attribute: Tally}}}: of the generated images and of the baselines."""
    generator = _generator(seed, split, "captions")
    scenes = sample_scenes(amounts.captions, generator, split, world)
    tokens, says = make_captions(scenes, generator)
    nearest = nearest_training_scenes(tokens, world, generator, pool=amounts.training_captions)
    reader = Reader(world)
    generated = reader.read(generate(tokens, mix_seed(seed, SPLITS.index(split))))
    readings = {
        "generated": generated,
        "renders": reader.read(render(scenes, size)),
        "shuffled": shuffle_images(generated, scenes["kind"]),
        "nearest": reader.read(render(nearest, size)),
    }
    # An attribute that has one value in the whole world is no achievement.
    choices = dict(fill=world.fills, size=world.sizes, background=world.backgrounds, texture=world.textures)
    attributes = tuple(name for name in ATTRIBUTES if len(choices.get(name, "many")) > 1)
    return {name: score_captions(reading, scenes, says, attributes) for name, reading in readings.items()}


def _generate(
    pipe: DALLE2, tokens: Tensor, seed: int, *, sampling: dict, batch_size: int, progress: bool
) -> Tensor:
    """The decoder's image of every caption: float [n, 3, R, R] in [0, 1] on the CPU."""
    texts, images = _texts(tokens), []
    idle = {"upsampler_steps"}
    idle |= set() if pipe.prior.diffuses else {"prior_steps", "prior_guidance_interval"}
    starts = range(0, len(texts), batch_size)
    for start in tqdm(starts, desc="generating images", unit="batch", disable=not progress, leave=False):
        # Within a call every caption gets the same noise; so every call gets another seed.
        made = pipe.generate(
            texts[start : start + batch_size],
            1,
            seed=mix_seed(seed, start),
            size=pipe.decoder.image_size,
            **{name: sampling[name] for name in SETTINGS if name not in idle},
        )
        images.append(made.images.cpu())
    return torch.cat(images)


def _score_upsampler(pipe: DALLE2, world: World, amounts: Amounts, seed: int, sampling: dict) -> dict:
    """PSNR of the first upsampler; a second one is not measured."""

    def upsample(images: Tensor, first: int) -> Tensor:
        seeds = [mix_seed(seed, first + row) for row in range(len(images))]
        return pipe.upsampler.sample(
            images.to(pipe.device),
            seeds=torch.tensor(seeds, device=pipe.device),
            steps=sampling["upsampler_steps"],
            sampler=sampling.get("upsampler_sampler") or sampling["sampler"],
        )

    low, high = pipe.sizes[:2]
    scenes = sample_scenes(amounts.pictures, _generator(seed, "iid", "upsampler"), "iid", world)
    return score_upsampler(upsample, scenes, low=low, high=high)


def _score_denoising(pipe: DALLE2, world: World, amounts: Amounts, seed: int) -> dict:
    """{"psnr": {log-SNR: dB}, "pictures": images, "outline_iou": {log-SNR: mean}, "outlines": images}.

    The last two are of about as many images of one large object, and None for a world without such.
    """
    generator = _generator(seed, "iid", "denoising")

    def denoise(scenes: Scenes) -> Iterator[tuple[int, Tensor, Tensor]]:
        tokens, _ = make_captions(scenes, generator)
        images = render(scenes, pipe.decoder.image_size).to(pipe.device)
        found = denoise_once(
            pipe.decoder,
            images,
            pipe.clip.encode_image(render(scenes, pipe.clip.image_size).to(pipe.device, pipe.dtype)),
            pipe.tokenizer.encode(_texts(tokens)).to(pipe.device),
            torch.arange(len(images), device=pipe.device),
        )
        return ((log_snr, x0, images) for log_snr, x0 in found)

    scenes = sample_scenes(amounts.pictures, generator, "iid", world)
    scores = ((log_snr, psnr(x0, true).mean().item()) for log_snr, x0, true in denoise(scenes))
    report = {"psnr": {str(log_snr): round(decibels, 2) for log_snr, decibels in scores}}
    report |= {"pictures": amounts.pictures, "outline_iou": None, "outlines": None}
    per_shape = max(1, amounts.pictures // len(world.shapes))
    if (single := outline_scenes(world, per_shape, generator)) is not None:
        shape = single["shape"][:, 0]
        scores = ((log_snr, outline_iou(x0, shape).mean().item()) for log_snr, x0, _ in denoise(single))
        report["outline_iou"] = {str(log_snr): round(iou, 4) for log_snr, iou in scores}
        report["outlines"] = len(shape)
    return report


# ------------------------------------------------------------------------------------------------ their needs


def _texts(tokens: Tensor) -> list[str]:
    """Scene captions as text, which every checkpoint's tokenizer can read."""
    scenes = WordTokenizer.scenes()
    return [scenes.decode(row) for row in tokens]


def _generator(seed: int, split: str, part: str) -> torch.Generator:
    """Each part of each split has another one: leaving out a part does not change the others' scores."""
    return torch.Generator().manual_seed(mix_seed(mix_seed(seed, SPLITS.index(split)), PARTS.index(part)))


def _versions() -> dict[str, str | None]:
    try:
        version = importlib.metadata.version("dalle2-fast")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = None
    return {"dalle2_fast": version, "python": platform.python_version(), "torch": torch.__version__}


def _to_json(scores):
    """Tallies at any depth of nested dicts -> plain dicts."""
    if isinstance(scores, dict):
        return {name: _to_json(value) for name, value in scores.items()}
    return scores.to_json()


@contextmanager
def _timed(report: dict, name: str) -> Iterator[None]:
    """Note the wall-clock seconds of a with-block in the report."""
    begin = time.perf_counter()
    yield
    report["seconds"][name] = round(time.perf_counter() - begin, 1)
