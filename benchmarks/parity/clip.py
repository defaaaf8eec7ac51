"""Rows of the parity report: CLIP against the classes of transformers, open_clip and OpenAI.

Each source builds the published model with random weights, all of them perturbed, and saves it in its usual
format; CLIP.from_pretrained(path) loads it. ViT-B-32 and RN50 are complete; the others have the published
widths and heads, but 2 blocks per Transformer and 1 per stage of a ResNet.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.cases.sizes import parameter_count
from benchmarks.parity.rows import Pairs, Row, on_meta
from dalle2_fast import CLIP
from dalle2_fast.checkpoints.formats.clip_options import from_open_clip
from dalle2_fast.data import BPETokenizer
from tests.support.clip_cases import NAMED

CAPTIONS = ["a photo of a cat", "stop!!!", "", "two dogs on a bench, 1950s, \N{SNOWMAN}"]
NOT_OPENAI = ("ViT-H-14", "ViT-g-14", "ViT-bigG-14")  # their GELU is exact, that of the others quick
COMPLETE = ("ViT-B-32", "RN50")


def config_of(name: str) -> dict:
    """open_clip's configuration."""
    config = copy.deepcopy(NAMED[name][0]) | {"quick_gelu": name not in NOT_OPENAI}
    if name not in COMPLETE:
        config["vision_cfg"]["layers"] = [1, 1, 1, 1] if name.startswith("RN") else 2
        config["text_cfg"]["layers"] = 2
    return config


def perturbed(model: nn.Module) -> nn.Module:
    """Noise on every weight: equal values, such as 0 or 1, would hide that two weights were exchanged."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.2 * parameter.std(correction=0).clamp(min=0.02) * torch.randn_like(parameter))
    for name, statistic in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            statistic.add_(0.2 * torch.rand_like(statistic))
    return model.eval()


def inputs(ours: CLIP) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(images in [0, 1], the same normalised, tokens)."""
    images = torch.rand(2, 3, ours.image_size, ours.image_size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value)[:, None, None] for value in (ours.image_mean, ours.image_std))
    return images, (images - mean) / std, BPETokenizer().encode(CAPTIONS)


def hugging_face(config: dict) -> Pairs:
    from transformers import CLIPConfig, CLIPModel

    vision, text = config["vision_cfg"], config["text_cfg"]
    both = dict(hidden_act="quick_gelu" if config["quick_gelu"] else "gelu",
                projection_dim=config["embed_dim"])
    words = dict(hidden_size=text["width"], num_hidden_layers=text["layers"],
                 num_attention_heads=text["heads"], intermediate_size=4 * text["width"]) | both
    pixels = dict(hidden_size=vision["width"], num_hidden_layers=vision["layers"],
                  num_attention_heads=vision["width"] // vision.get("head_width", 64),
                  intermediate_size=int(vision["width"] * vision.get("mlp_ratio", 4.0)),
                  patch_size=vision["patch_size"], image_size=vision["image_size"]) | both
    torch.manual_seed(0)
    theirs = perturbed(CLIPModel(CLIPConfig(text_config=words, vision_config=pixels,
                                            projection_dim=config["embed_dim"])))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = CLIP.from_pretrained(folder)
    images, normalised, tokens = inputs(ours)
    yield ours.encode_image(images, normalize=False), theirs.get_image_features(normalised).pooler_output
    embed, encodings, mask = ours.encode_text(tokens, normalize=False)
    expected = theirs.get_text_features(tokens)
    yield embed, expected.pooler_output
    yield encodings[mask], expected.last_hidden_state[mask]
    yield ours(tokens, images, return_loss=False), theirs(tokens, normalised).logits_per_image


def open_clip(config: dict) -> Pairs:
    from open_clip.model import CLIP as Theirs

    vision, text = config["vision_cfg"], config["text_cfg"]
    torch.manual_seed(0)
    theirs = perturbed(Theirs(config["embed_dim"], vision, text, config["quick_gelu"]))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder) / "open_clip_pytorch_model.bin")
        (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        ours = CLIP.from_pretrained(folder)
    yield from pairs(ours, theirs)


def openai(config: dict) -> Pairs:
    # The package imports pkg_resources, which newer setuptools no longer have; the file of the model does
    # not.
    file = Path(importlib.util.find_spec("clip").origin).with_name("model.py")
    spec = importlib.util.spec_from_file_location("openai_clip", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vision, text = config["vision_cfg"], config["text_cfg"]
    torch.manual_seed(0)
    theirs = perturbed(module.CLIP(
        config["embed_dim"], vision["image_size"], vision["layers"], vision["width"], vision["patch_size"],
        text["context_length"], text["vocab_size"], text["width"], text["heads"], text["layers"],
    ))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        state = theirs.state_dict() | {"input_resolution": torch.tensor(vision["image_size"])}
        torch.save(state, Path(folder) / "model.pt")
        ours = CLIP.from_pretrained(Path(folder) / "model.pt")
    yield from pairs(ours, theirs)


def pairs(ours: CLIP, theirs: nn.Module) -> Pairs:
    images, normalised, tokens = inputs(ours)
    yield ours.encode_image(images, normalize=False), theirs.encode_image(normalised)
    embed, encodings, mask = ours.encode_text(tokens, normalize=False)
    found = []  # the encodings of all tokens, which their encode_text does not return
    theirs.ln_final.register_forward_hook(lambda module, inputs, output: found.append(output))
    yield embed, theirs.encode_text(tokens)
    yield encodings[mask], found[0][mask]


def clip_rows() -> list[Row]:
    rows = []
    for name in NAMED:
        published = from_open_clip(NAMED[name][0] | {"quick_gelu": name not in NOT_OPENAI}, name)
        count = parameter_count(on_meta(CLIP, **published))
        sources: dict[str, tuple[str, Callable[[dict], Pairs]]] = {}
        if not name.startswith("RN"):  # Hugging Face's CLIP has no ResNets
            sources["transformers CLIPModel"] = "transformers", hugging_face
        sources["open_clip CLIP"] = "open_clip", open_clip
        if name not in NOT_OPENAI:
            sources["OpenAI CLIP"] = "clip", openai
        for source, (package, measure) in sources.items():
            rows.append(Row(f"CLIP {name}", source, (package,), count,
                            lambda name=name, measure=measure: measure(config_of(name))))
    return rows
