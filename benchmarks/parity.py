"""Our networks beside those they load the weights of: the largest relative difference of their outputs.

    python benchmarks/parity.py            writes benchmarks/results/parity.json and parity.md

Both hold the same random weights, scaled down, in float32 on the CPU; the parameters are those of the
published size, counted on the meta device. A source that is not installed is named, and its rows stay as they
were measured last. Exits with 1 if a difference is larger than its bound.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from timing import RESULTS, commit, parameters, versions, write  # noqa: E402
from torch import Tensor  # noqa: E402

from dalle2_fast import CLIP, DALLE2, Decoder, DiffusionPrior, Upsampler  # noqa: E402

Pairs = Iterator[tuple[Tensor, Tensor]]  # (ours, theirs)
NETWORK, CHAIN = 1e-5, 1e-3  # bounds of the norm of the difference over the norm
DRAWS = 3


@dataclass
class Row:
    network: str
    source: str  # whose network it is compared with
    needs: tuple[str, ...]  # packages
    parameters: int  # of the published size
    measure: Callable[[], Pairs]
    bound: float = NETWORK


@dataclass
class Measured:
    network: str
    source: str
    parameters: int
    relative_difference: float  # |ours - theirs| / |theirs|, norms, the largest of all outputs
    largest_element: float  # max |ours - theirs| / max |theirs|
    bound: float
    date: str
    commit: str
    versions: dict[str, str | None] = field(default_factory=dict)


def on_meta(make: Callable[..., torch.nn.Module], **options) -> torch.nn.Module:
    with torch.device("meta"):
        return make(**options)


# ------------------------------------------------------------------------------------------------------ Karlo


class Karlo:
    """The scaled-down pipelines, made once."""

    made: tuple | None = None

    @classmethod
    def both(cls) -> tuple:
        """(diffusers' pipeline, our chain loaded from its folder)."""
        import tiny_karlo

        if cls.made is None:
            with tempfile.TemporaryDirectory() as folder:
                theirs = tiny_karlo.pipeline(Path(folder) / "tokenizer_files")
                theirs.set_progress_bar_config(disable=True)
                theirs.save_pretrained(Path(folder) / "karlo")
                cls.made = theirs, DALLE2.from_pretrained(Path(folder) / "karlo")
        return cls.made


def draws() -> Iterator[tuple[Callable[..., Tensor], Tensor, Tensor]]:
    """(normal numbers of a shape, three times, a mask of captions) for each draw."""
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator=generator) -> Tensor:
            return torch.randn(*shape, generator=generator)

        lengths = torch.randint(2, 14, (3, 1), generator=generator)
        yield normal, torch.randint(0, 1000, (3,), generator=generator), torch.arange(13) < lengths


def karlo_prior() -> Pairs:
    theirs, ours = Karlo.both()
    for normal, times, mask in draws():
        given = (normal(3, 64), times, normal(3, 64), normal(3, 13, 64), mask)
        yield ours.prior.net(*given), theirs.prior(*given).predicted_image_embedding
        yield ours.prior._restored(given[0]), theirs.prior.post_process_latents(given[0])


def karlo_decoder() -> Pairs:
    theirs, ours = Karlo.both()
    for normal, times, mask in draws():
        x, context, classes = normal(3, 3, 16, 16), normal(3, 17, 48), normal(3, 256)
        mask = torch.nn.functional.pad(mask, (4, 0), value=True)
        expected = theirs.decoder(x, times, context, class_labels=classes, attention_mask=mask).sample
        yield ours.decoder.unet(x, times, context, classes, mask), expected


def karlo_text_proj() -> Pairs:
    from dalle2_fast.models.conditioning import Caption

    theirs, ours = Karlo.both()
    for normal, _, mask in draws():
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
        theirs, ours = Karlo.both()
        net = ours.upsampler.unet if name == "first" else ours.upsampler.last_unet
        for normal, times, _ in draws():
            x = normal(3, 6, 32, 32)
            yield net(x, times), getattr(theirs, f"super_res_{name}")(x, times).sample

    return measure


def karlo_text() -> Pairs:
    theirs, ours = Karlo.both()
    prompts = ["the red ring", "and", ""]
    inputs = theirs.tokenizer(prompts, padding="max_length", max_length=13, return_tensors="pt")
    expected = theirs.text_encoder(inputs.input_ids)
    embed, encodings, mask = ours.clip.encode_text(ours.tokenizer.encode(prompts), normalize=False)
    yield embed, expected.text_embeds
    yield encodings[mask], expected.last_hidden_state[mask]


def karlo_chain(exact: bool) -> Callable[[], Pairs]:
    """Five steps of each of the three diffusions, from the same noise, guidance 4 and 8."""

    def measure() -> Pairs:
        import pytest
        import test_checkpoints_karlo as karlo

        theirs, ours = Karlo.both()
        with pytest.MonkeyPatch.context() as patch:
            if exact:
                for name in karlo.tiny_karlo.schedulers():
                    patch.setattr(theirs, name, karlo.copy_of(getattr(theirs, name)))
                    karlo.in_float64(getattr(theirs, name))
            yield karlo.both(theirs, ours, patch)

    return measure


def karlo_originals() -> Pairs:
    """Weights, not outputs: the same ones from Karlo's original files and from diffusers' folder."""
    import tiny_karlo

    theirs, ours = Karlo.both()
    with tempfile.TemporaryDirectory() as folder:
        tiny_karlo.original_files(Path(folder), theirs.components)
        for name, kind in (("prior", DiffusionPrior), ("decoder", Decoder), ("upsampler", Upsampler)):
            loaded = kind.from_pretrained(folder).state_dict()
            for key, expected in getattr(ours, name).state_dict().items():
                yield loaded[key], expected


def karlo_rows() -> list[Row]:
    prior, decoder, upsampler = on_meta(DiffusionPrior), on_meta(Decoder), on_meta(Upsampler)
    statistics = 2 * prior.image_embed_dim  # parameters in diffusers, buffers with us
    text, unet = parameters(on_meta(CLIP, visual_kind=None)) - 1, parameters(upsampler)
    whole = parameters(prior) + statistics + parameters(decoder) + 2 * unet + text
    needs = ("diffusers", "transformers")

    def row(network: str, source: str, count: int, measure: Callable[[], Pairs], bound=NETWORK) -> Row:
        return Row(f"Karlo {network}", source, needs, count, measure, bound)

    return [
        row("prior", "diffusers PriorTransformer", parameters(prior) + statistics, karlo_prior),
        row("decoder", "diffusers UNet2DConditionModel", parameters(decoder.unet), karlo_decoder),
        row("text_proj", "diffusers UnCLIPTextProjModel", parameters(decoder.text_proj), karlo_text_proj),
        row("upsampler, first steps", "diffusers UNet2DModel", unet, karlo_upsampler("first")),
        row("upsampler, last step", "diffusers UNet2DModel", unet, karlo_upsampler("last")),
        row("text encoder", "transformers CLIPTextModelWithProjection", text, karlo_text),
        row("chain, 5 steps a stage", "diffusers UnCLIPPipeline", whole, karlo_chain(False), CHAIN),
        row("chain, 5 steps a stage", "diffusers UnCLIPPipeline, its tables in float64", whole,
            karlo_chain(True), CHAIN),
        row("weights from the original files", "the same from diffusers' folder", whole - text,
            karlo_originals, 0.0),
    ]


# ------------------------------------------------------------------------------------------------------- CLIP


# name -> (head width, patch, quick_gelu) of the scaled-down model that stands for it
CLIPS = {
    "ViT-B-32": (64, 32, True), "ViT-B-16": (64, 16, True), "ViT-L-14": (64, 14, True),
    "ViT-H-14": (80, 14, False), "ViT-bigG-14": (104, 14, False), "RN50": (64, None, True),
}  # fmt: skip


def clip_hugging_face(name: str) -> Callable[[], Pairs]:
    def measure() -> Pairs:
        import test_checkpoints_clip_sources as sources

        head, patch, quick = CLIPS[name]
        theirs = sources.hugging_face((2 * head, 2), "quick_gelu" if quick else "gelu", patch=patch)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = CLIP.from_pretrained(folder)
        images, normalised = sources.pictures(ours.image_size)
        yield ours.encode_image(images, normalize=False), theirs.get_image_features(normalised).pooler_output
        embed, encodings, mask = ours.encode_text(sources.TEXT, normalize=False)
        output = theirs.get_text_features(sources.TEXT)
        yield embed, output.pooler_output
        yield encodings[mask], output.last_hidden_state[mask]
        yield ours(sources.TEXT, images, return_loss=False), theirs(sources.TEXT, normalised).logits_per_image

    return measure


def clip_open_clip(name: str) -> Callable[[], Pairs]:
    def measure() -> Pairs:
        import test_checkpoints_clip_sources as sources

        head, patch, quick = CLIPS[name]
        vision = sources.RESNET if patch is None else dict(
            image_size=2 * patch, patch_size=patch, layers=2, width=2 * head, head_width=head)
        config = sources.open_clip_config(vision, quick)
        theirs = sources.open_clip_model(config)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(theirs.state_dict(), Path(folder) / "open_clip_pytorch_model.bin")
            text = json.dumps({"model_cfg": config})
            (Path(folder) / "open_clip_config.json").write_text(text)
            ours = CLIP.from_pretrained(folder)
        images, normalised = sources.pictures(ours.image_size)
        yield ours.encode_image(images, normalize=False), theirs.encode_image(normalised)
        yield ours.encode_text(sources.TEXT, normalize=False)[0], theirs.encode_text(sources.TEXT)

    return measure


def clip_openai(name: str) -> Callable[[], Pairs]:
    def measure() -> Pairs:
        import test_checkpoints_clip_sources as sources

        # Its package asks for pkg_resources, which newer setuptools do not have; the model's file does not.
        file = Path(importlib.util.find_spec("clip").origin).with_name("model.py")
        place = importlib.util.spec_from_file_location("openai_clip", file)
        module = importlib.util.module_from_spec(place)
        place.loader.exec_module(module)
        _, patch, _ = CLIPS[name]
        size, layers, width = (64, (1, 1, 2, 1), 16) if patch is None else (2 * patch, 2, 128)
        torch.manual_seed(0)
        theirs = sources.shaken(module.CLIP(24, size, layers, width, patch, 8, sources.TOKENS, 64, 1, 2))
        with tempfile.TemporaryDirectory() as folder:
            state = theirs.state_dict() | {"input_resolution": torch.tensor(size)}
            torch.save(state, Path(folder) / "model.pt")
            ours = CLIP.from_pretrained(Path(folder) / "model.pt")
        images, normalised = sources.pictures(size)
        yield ours.encode_image(images, normalize=False), theirs.encode_image(normalised)
        yield ours.encode_text(sources.TEXT, normalize=False)[0], theirs.encode_text(sources.TEXT)

    return measure


def clip_rows() -> list[Row]:
    from clip_cases import NAMED

    from dalle2_fast.checkpoints.clip_options import from_open_clip

    rows = []
    for name, (_, patch, quick) in CLIPS.items():
        options = from_open_clip(NAMED[name][0] | {"quick_gelu": quick}, name)
        count = parameters(on_meta(CLIP, **options))
        if patch is not None:  # Hugging Face's CLIP has no ResNets
            rows.append(Row(f"CLIP {name}", "transformers CLIPModel", ("transformers",), count,
                            clip_hugging_face(name)))
        rows.append(Row(f"CLIP {name}", "open_clip CLIP", ("open_clip",), count, clip_open_clip(name)))
        if name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "RN50"):
            rows.append(Row(f"CLIP {name}", "OpenAI CLIP", ("clip",), count, clip_openai(name)))
    return rows


# ------------------------------------------------------------------------------------------------- the report


@torch.no_grad()
def measure(row: Row) -> Measured:
    """RuntimeError if an output is not finite or says nothing: no difference is reported for it."""
    norm = element = 0.0
    for ours, theirs in row.measure():
        if ours.shape != theirs.shape or not torch.isfinite(ours).all() or not theirs.abs().max() > 0:
            raise RuntimeError(f"{row.network}: outputs {tuple(ours.shape)} and {tuple(theirs.shape)}")
        difference = (ours - theirs).double()
        norm = max(norm, (difference.norm() / theirs.double().norm()).item())
        element = max(element, (difference.abs().max() / theirs.abs().max()).item())
    distributions = {"open_clip": "open_clip_torch", "clip": "clip-anytorch"}
    packages = (distributions.get(name, name) for name in row.needs)
    return Measured(
        row.network, row.source, row.parameters, float(f"{norm:.3g}"), float(f"{element:.3g}"), row.bound,
        time.strftime("%Y-%m-%d"), commit(), versions(*packages),
    )  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = [
        "# Parity",
        "",
        "Outputs of our networks beside those of the source, both with the same random weights, scaled down,",
        "float32 on the CPU: the norm of the difference over the norm, and the largest element of the",
        "difference over the largest of the source, each the worst of all outputs and draws. Parameters are",
        "those of the published size. Written by `python benchmarks/parity.py`.",
        "",
        "| network | source | parameters | max relative difference | largest element | bound | measured |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        needed = {name: v for name, v in row["versions"].items() if name != "python"}
        measured = ", ".join([row["date"], row["commit"], *(f"{name} {v}" for name, v in needed.items())])
        numbers = f"{row['relative_difference']:.1e} | {row['largest_element']:.1e} | {row['bound']:.0e}"
        lines.append(
            f"| {row['network']} | {row['source']} | {row['parameters']:,} | {numbers} | {measured} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose network or source has this")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # that diffusers will drop UnCLIPPipeline
    path, kept = RESULTS / "parity.json", {}
    if path.is_file():
        old = json.loads(path.read_text())["rows"]
        kept = {(row["network"], row["source"]): row for row in old}
    rows, failed = [], []
    for row in [*karlo_rows(), *clip_rows()]:
        key = (row.network, row.source)
        absent = [name for name in row.needs if importlib.util.find_spec(name) is None]
        chosen = arguments.only in row.network or arguments.only in row.source
        if absent or not chosen:
            if absent:
                last = f"kept from {kept[key]['date']}" if key in kept else "left out"
                print(f"{row.network}, {row.source}: {', '.join(absent)} not installed, {last}")
            rows += [kept[key]] if key in kept else []
            continue
        made = asdict(measure(row))
        print(f"{row.network}, {row.source}: {made['relative_difference']:.1e} (bound {row.bound:.0e})")
        if not made["relative_difference"] <= row.bound:
            failed.append(row.network)
        rows.append(made)
    if failed:
        print(f"larger than the bound, nothing is written: {', '.join(failed)}", file=sys.stderr)
        return 1
    write(path, json.dumps({"rows": rows}, indent=2) + "\n")
    write(path.with_suffix(".md"), table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
