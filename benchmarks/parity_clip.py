"""How far our CLIP is from transformers' and open_clip's with the same weights.

    python benchmarks/parity_clip.py        writes benchmarks/results/parity_clip.json and .md

What is installed is compared; the rows of the other source are kept. Each source builds the published model
with random weights, all of them disturbed, saves it as it saves any model, and CLIP.from_pretrained(path)
loads it. The numbers are max |ours - theirs| / max |theirs| in float32 of embeddings of 2 images and 4
captions, and of the captions' encodings. ViT-B/32 and RN50 are whole; the others have every width and head of
the published ones, but 2 blocks a Transformer and 1 a stage of a ResNet.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from timing import RESULTS, machine, save, versions
from torch import Tensor, nn

from dalle2_fast import CLIP
from dalle2_fast.data import BPETokenizer

OUTPUTS = ("image_embedding", "text_embedding", "text_encodings")
CAPTIONS = ["a photo of a cat", "stop!!!", "", "two dogs on a bench, 1950s, \N{SNOWMAN}"]
VIT = {  # name -> (image width, layers, heads, MLP), patch, size, (text width, layers, heads), embedding
    "ViT-B/32": ((768, 12, 12, 3072), 32, 224, (512, 12, 8), 512),
    "ViT-B/16": ((768, 2, 12, 3072), 16, 224, (512, 2, 8), 512),
    "ViT-L/14": ((1024, 2, 16, 4096), 14, 224, (768, 2, 12), 768),
    "ViT-L/14@336": ((1024, 2, 16, 4096), 14, 336, (768, 2, 12), 768),
    "ViT-H/14": ((1280, 2, 16, 5120), 14, 224, (1024, 2, 16), 1024),
    "ViT-bigG/14": ((1664, 2, 16, 8192), 14, 224, (1280, 2, 20), 1280),
}
RESNET = {  # name -> base width, layers, size, (text width, layers, heads), embedding
    "RN50": (64, [3, 4, 6, 3], 224, (512, 12, 8), 1024),
    "RN101": (64, [1, 1, 1, 1], 224, (512, 2, 8), 512),
    "RN50x4": (80, [1, 1, 1, 1], 288, (640, 2, 10), 640),
    "RN50x16": (96, [1, 1, 1, 1], 384, (768, 2, 12), 768),
    "RN50x64": (128, [1, 1, 1, 1], 448, (1024, 2, 16), 1024),
}


def disturbed(model: nn.Module) -> nn.Module:
    """No weight at a value, such as 0 or 1, that would hide where it goes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * parameter.std(correction=0).clamp(min=0.02) * torch.randn_like(parameter))
        for name, statistic in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                statistic.add_(0.2 * torch.rand_like(statistic))
    return model.eval()


def transformers_models() -> Iterator[tuple[str, nn.Module]]:
    from transformers import CLIPConfig, CLIPModel

    for place, (name, (image, patch, size, text, embedding)) in enumerate(VIT.items()):
        act = "gelu" if place % 2 else "quick_gelu"
        words = dict(hidden_size=text[0], num_hidden_layers=text[1], num_attention_heads=text[2],
                     intermediate_size=4 * text[0], hidden_act=act, projection_dim=embedding)
        pixels = dict(hidden_size=image[0], num_hidden_layers=image[1], num_attention_heads=image[2],
                      intermediate_size=image[3], patch_size=patch, image_size=size, hidden_act=act,
                      projection_dim=embedding)
        config = CLIPConfig(text_config=words, vision_config=pixels, projection_dim=embedding)
        torch.manual_seed(0)
        yield f"{name}, {act}", disturbed(CLIPModel(config))


def open_clip_models() -> Iterator[tuple[str, nn.Module, dict]]:
    from open_clip.model import CLIP as Theirs

    configs = {}
    for name, (image, patch, size, text, embedding) in VIT.items():
        vision = dict(image_size=size, patch_size=patch, width=image[0], layers=image[1],
                      head_width=image[0] // image[2], mlp_ratio=(image[3] + 0.5) / image[0])
        configs[name] = embedding, vision, text
    for name, (width, layers, size, text, embedding) in RESNET.items():
        configs[name] = embedding, dict(image_size=size, width=width, layers=layers, patch_size=None), text
    for place, (name, (embedding, vision, text)) in enumerate(configs.items()):
        words = dict(context_length=77, vocab_size=49408, width=text[0], layers=text[1], heads=text[2])
        config = dict(embed_dim=embedding, quick_gelu=place % 2 == 0, vision_cfg=vision, text_cfg=words)
        torch.manual_seed(0)
        model = Theirs(embedding, vision, words, config["quick_gelu"])
        yield f"{name}, {'quick_gelu' if place % 2 == 0 else 'gelu'}", disturbed(model), config


def difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not theirs.abs().max() > 0:
        raise RuntimeError(f"expected {tuple(theirs.shape)}, got {tuple(ours.shape)}: nothing is reported")
    return float((ours - theirs).abs().max() / theirs.abs().max())


def inputs(ours: CLIP) -> tuple[Tensor, Tensor, Tensor]:
    """(images in [0, 1], the same normalised, tokens)."""
    images = torch.rand(2, 3, ours.image_size, ours.image_size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value)[:, None, None] for value in (ours.image_mean, ours.image_std))
    return images, (images - mean) / std, BPETokenizer().encode(CAPTIONS)


def row(source: str, name: str, ours: CLIP, theirs: tuple[Tensor, Tensor, Tensor], images: Tensor,
        tokens: Tensor) -> dict:
    image, text, hidden = theirs
    embedding, encodings, mask = ours.encode_text(tokens, normalize=False)
    result = {
        "network": name, "source": source, "parameters": sum(x.numel() for x in ours.parameters()),
        "image_embedding": difference(ours.encode_image(images, normalize=False), image),
        "text_embedding": difference(embedding, text),
        "text_encodings": difference(encodings[mask], hidden[mask]),
    }
    print(json.dumps(result), flush=True)
    return result


@torch.no_grad()
def transformers_rows() -> Iterator[dict]:
    for name, theirs in transformers_models():
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = CLIP.from_pretrained(folder)
        images, normalised, tokens = inputs(ours)
        image, text = theirs.get_image_features(normalised), theirs.get_text_features(tokens)
        outputs = image.pooler_output, text.pooler_output, text.last_hidden_state
        yield row("transformers", name, ours, outputs, images, tokens)


@torch.no_grad()
def open_clip_rows() -> Iterator[dict]:
    for name, theirs, config in open_clip_models():
        with tempfile.TemporaryDirectory() as folder:
            torch.save(theirs.state_dict(), Path(folder, "open_clip_pytorch_model.bin"))
            Path(folder, "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
            ours = CLIP.from_pretrained(folder)
        images, normalised, tokens = inputs(ours)
        hidden = theirs.token_embedding(tokens) + theirs.positional_embedding
        hidden = theirs.ln_final(theirs.transformer(hidden, attn_mask=theirs.attn_mask))
        outputs = theirs.encode_image(normalised), theirs.encode_text(tokens), hidden
        yield row("open_clip", name, ours, outputs, images, tokens)


def order(each: dict) -> tuple[str, str]:
    return each["source"], re.sub(r"\d+", lambda number: number[0].zfill(3), each["network"])


def table(rows: list[dict]) -> str:
    lines = ["| network | source | parameters | image embedding | text embedding | text encodings |",
             "|---|---|---|---|---|---|"]
    for each in rows:
        numbers = " | ".join(f"{each[key]:.1e}" for key in OUTPUTS)
        lines.append(f"| {each['network']} | {each['source']} | {each['parameters']:,} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    path = RESULTS / "parity_clip.json"
    report = json.loads(path.read_text()) if path.exists() else {"rows": [], "runs": {}}
    for source, package, make in (("transformers", "transformers", transformers_rows),
                                  ("open_clip", "open_clip_torch", open_clip_rows)):
        if find_spec(source) is None:
            print(f"{source} is not installed: its rows stay as they are")
            continue
        rows = list(make())
        report["rows"] = [each for each in report["rows"] if each["source"] != source] + rows
        report["runs"][source] = {"machine": machine(), "versions": versions(package)}
    rows = sorted(report["rows"], key=order)
    save("parity_clip", {"runs": report["runs"], "rows": rows})
    what = " ".join(__doc__.split("Each source", 1)[1].split())
    path.with_suffix(".md").write_text(f"{__doc__.splitlines()[0]}\n\nEach source {what}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
