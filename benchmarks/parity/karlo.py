"""Rows of the parity report: Karlo, scaled down, against diffusers. Both have the same random weights."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases.sizes import parameter_count
from benchmarks.parity.rows import NETWORK, PIPELINE, Pairs, Row, on_meta
from dalle2_fast import CLIP, DALLE2, Decoder, DiffusionPrior, Upsampler

SEEDS = range(3)


@functools.cache
def pipelines() -> tuple:
    """(diffusers' scaled-down pipeline, ours loaded from its folder)."""
    from tests.support import tiny_karlo

    with tempfile.TemporaryDirectory() as folder:
        theirs = tiny_karlo.pipeline(Path(folder) / "tokenizer_files")
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(Path(folder) / "karlo")
        return theirs, DALLE2.from_pretrained(Path(folder) / "karlo", device="cpu", dtype="fp32")


def random_inputs() -> Iterator[tuple[Callable[..., Tensor], Tensor, Tensor]]:
    """(function of a shape that returns normal numbers, three timesteps, mask of three captions) per seed."""
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator=generator) -> Tensor:
            return torch.randn(*shape, generator=generator)

        lengths = torch.randint(2, 14, (3, 1), generator=generator)
        yield normal, torch.randint(0, 1000, (3,), generator=generator), torch.arange(13) < lengths


def karlo_prior() -> Pairs:
    theirs, ours = pipelines()
    for normal, times, mask in random_inputs():
        given = (normal(3, 64), times, normal(3, 64), normal(3, 13, 64), mask)
        yield ours.prior.net(*given), theirs.prior(*given).predicted_image_embedding
        yield ours.prior.restore(given[0]), theirs.prior.post_process_latents(given[0])


def karlo_decoder() -> Pairs:
    theirs, ours = pipelines()
    for normal, times, mask in random_inputs():
        x, context, classes = normal(3, 3, 16, 16), normal(3, 17, 48), normal(3, 256)
        mask = torch.nn.functional.pad(mask, (4, 0), value=True)
        expected = theirs.decoder(x, times, context, class_labels=classes, attention_mask=mask).sample
        yield ours.decoder.unet(x, times, context, classes, mask), expected


def karlo_text_proj() -> Pairs:
    from dalle2_fast.models.captions import Caption

    theirs, ours = pipelines()
    for normal, _, mask in random_inputs():
        image, text, encodings = normal(3, 64), normal(3, 64), normal(3, 13, 64)
        context, classes = theirs.text_proj(
            image_embeddings=image, prompt_embeds=text, text_encoder_hidden_states=encodings,
            do_classifier_free_guidance=False,
        )  # fmt: skip
        keep = torch.ones(3, dtype=torch.bool)
        found, _, vector = ours.decoder.text_proj(image, Caption(text, encodings, mask), keep, keep)
        yield found, context
        yield vector, classes


def karlo_upsampler(name: str) -> Callable[[], Pairs]:
    def measure() -> Pairs:
        theirs, ours = pipelines()
        net = ours.upsampler.unet if name == "first" else ours.upsampler.last_unet
        for normal, times, _ in random_inputs():
            x = normal(3, 6, 32, 32)
            yield net(x, times), getattr(theirs, f"super_res_{name}")(x, times).sample

    return measure


def karlo_text() -> Pairs:
    theirs, ours = pipelines()
    prompts = ["the red ring", "and", ""]
    inputs = theirs.tokenizer(prompts, padding="max_length", max_length=13, return_tensors="pt")
    expected = theirs.text_encoder(inputs.input_ids)
    embed, encodings, mask = ours.clip.encode_text(ours.tokenizer.encode(prompts), normalize=False)
    yield embed, expected.text_embeds
    yield encodings[mask], expected.last_hidden_state[mask]


def karlo_pipeline(exact: bool) -> Callable[[], Pairs]:
    """Five steps of each of the three diffusions, from the same noise, guidance 4 and 8.

    exact: diffusers' tables are computed in float64.
    """

    def measure() -> Pairs:
        import pytest

        from tests.checkpoints import test_karlo
        from tests.support import tiny_karlo

        theirs, ours = pipelines()
        with pytest.MonkeyPatch.context() as patch:
            if exact:
                for name in tiny_karlo.schedulers():
                    patch.setattr(theirs, name, copy.copy(getattr(theirs, name)))
                    test_karlo.in_float64(getattr(theirs, name))
            yield test_karlo.both(theirs, ours, patch)

    return measure


def karlo_originals() -> Pairs:
    """Weights, not outputs: those from Karlo's original files against those from diffusers' folder."""
    from tests.support import tiny_karlo

    theirs, ours = pipelines()
    with tempfile.TemporaryDirectory() as folder:
        tiny_karlo.original_files(Path(folder), theirs.components)
        for name, kind in (("prior", DiffusionPrior), ("decoder", Decoder), ("upsampler", Upsampler)):
            loaded = kind.from_pretrained(folder).state_dict()
            for key, expected in getattr(ours, name).state_dict().items():
                yield loaded[key], expected


def karlo_rows() -> list[Row]:
    prior, decoder, upsampler = on_meta(DiffusionPrior), on_meta(Decoder), on_meta(Upsampler)
    statistics = 2 * prior.image_embed_dim  # parameters in diffusers, buffers in ours
    text, unet = parameter_count(on_meta(CLIP, visual_kind=None)) - 1, parameter_count(upsampler)
    whole = parameter_count(prior) + statistics + parameter_count(decoder) + 2 * unet + text
    needs = ("diffusers", "transformers")

    def row(network: str, source: str, count: int, measure: Callable[[], Pairs], bound=NETWORK) -> Row:
        return Row(f"Karlo {network}", source, needs, count, measure, bound)

    return [
        row("prior", "diffusers PriorTransformer", parameter_count(prior) + statistics, karlo_prior),
        row("decoder", "diffusers UNet2DConditionModel", parameter_count(decoder.unet), karlo_decoder),
        row("text_proj", "diffusers UnCLIPTextProjModel", parameter_count(decoder.text_proj),
            karlo_text_proj),
        row("upsampler, first steps", "diffusers UNet2DModel", unet, karlo_upsampler("first")),
        row("upsampler, last step", "diffusers UNet2DModel", unet, karlo_upsampler("last")),
        row("text encoder", "transformers CLIPTextModelWithProjection", text, karlo_text),
        row("chain, 5 steps a stage", "diffusers UnCLIPPipeline", whole, karlo_pipeline(False), PIPELINE),
        row("chain, 5 steps a stage", "diffusers UnCLIPPipeline, its tables in float64", whole,
            karlo_pipeline(True), PIPELINE),
        row("weights from the original files", "the same from diffusers' folder", whole - text,
            karlo_originals, 0.0),
    ]
