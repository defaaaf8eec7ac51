"""Checkpoints of every layout that we read, each with one file damaged."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle2_fast import CLIP, DiffusionPrior
from dalle2_fast.training.weights import save_weights
from tests.hostile.damage import ANY_FILE, Damage
from tests.hostile.damage_json import INDEX, JSON, number_places, with_number
from tests.hostile.damage_safetensors import CONFIG_IN_HEADER, SAFETENSORS
from tests.hostile.damage_torch import TORCH
from tests.support.clip_cases import config_of_hugging_face, config_of_open_clip, small, torchscript
from tests.support.tiny_pipeline import load_on_cpu, tiny_pipeline


@dataclass(frozen=True)
class Layout:
    """One kind of checkpoint.

    Args:
        make: writes a good checkpoint into an empty folder, and returns the path that is loaded.
        load: loads it.
        files: a file below that path -> what is done to it.
        needs: a package that writes it.
        has_digest: whether a flipped byte in its weights is found.
    """

    make: Callable[[Path], Path]
    load: Callable[[Path], nn.Module]
    files: dict[str, dict[str, Damage]]
    needs: str | None = None
    has_digest: bool = False


def ours(folder: Path) -> Path:
    return tiny_pipeline().save_pretrained(folder / "ours")


def network(folder: Path) -> Path:
    return tiny_pipeline().prior.save_pretrained(folder / "prior")


def diffusers(folder: Path) -> Path:
    from tests.support import tiny_karlo

    tiny_karlo.pipeline(folder / "tokenizer").save_pretrained(folder / "karlo")
    return folder / "karlo"


def karlo(folder: Path) -> Path:
    from tests.support import tiny_karlo

    parts = tiny_karlo.pipeline(folder / "tokenizer").components
    place = tiny_karlo.original_files(folder / "originals", parts)
    clip = CLIP(dim_text=64, dim_image=64, dim_latent=64, text_enc_depth=1, text_heads=1, visual_enc_depth=1,
                visual_heads=1, visual_image_size=16, visual_patch_size=8)  # fmt: skip
    torch.save(clip.state_dict() | {"input_resolution": torch.tensor(16)}, place / "ViT-L-14.pt")
    return place


def openai_archive(folder: Path) -> Path:
    state = small().to_state_dict("open_clip")
    return torchscript(folder / "clip.pt", state | {"input_resolution": torch.tensor(16)})


def open_clip(folder: Path) -> Path:
    torch.save(small().to_state_dict("open_clip"), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config_of_open_clip()}))
    return folder


def hugging_face(folder: Path) -> Path:
    save_file(small().to_state_dict("huggingface"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of_hugging_face()))
    return folder


def sharded(folder: Path) -> Path:
    hugging_face(folder)
    (folder / "model.safetensors").unlink()
    tensors = sorted(small().to_state_dict("huggingface").items())
    places = {}
    for number, part in enumerate((tensors[::2], tensors[1::2])):
        save_file(dict(part), folder / f"part-{number}.safetensors")
        places |= {name: f"part-{number}.safetensors" for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def trained(folder: Path) -> Path:
    clip = small()
    save_weights(folder / "model.safetensors", {"model": clip.config}, clip.state_dict())
    return folder


def torch_files(name: str) -> dict[str, dict[str, Damage]]:
    return {name: ANY_FILE | TORCH}


LAYOUTS = {
    "dalle2_fast": Layout(
        ours, load_on_cpu, {"model.safetensors": ANY_FILE | SAFETENSORS, "config.json": ANY_FILE | JSON},
        has_digest=True,
    ),
    "one network": Layout(
        network, DiffusionPrior.from_pretrained, {"model.safetensors": SAFETENSORS, "config.json": JSON},
        has_digest=True,
    ),
    "diffusers": Layout(
        diffusers, load_on_cpu,
        {
            "model_index.json": ANY_FILE | JSON,
            "decoder/config.json": JSON,
            "prior/config.json": JSON,
            "super_res_first/config.json": JSON,
            "text_encoder/config.json": JSON,
            "decoder/diffusion_pytorch_model.safetensors": ANY_FILE | SAFETENSORS,
            "tokenizer/tokenizer.json": ANY_FILE | JSON,
        },
        "diffusers",
    ),
    "karlo": Layout(
        karlo, load_on_cpu,
        torch_files("decoder-ckpt*") | torch_files("ViT-L-14_stats.th") | torch_files("ViT-L-14.pt"),
        "diffusers",
    ),
    "openai archive": Layout(openai_archive, CLIP.from_pretrained, torch_files("clip.pt"), has_digest=True),
    "open_clip": Layout(
        open_clip, CLIP.from_pretrained,
        torch_files("open_clip_pytorch_model.bin") | {"open_clip_config.json": ANY_FILE | JSON},
    ),
    "hugging face": Layout(
        hugging_face, CLIP.from_pretrained,
        {"model.safetensors": ANY_FILE | SAFETENSORS, "config.json": ANY_FILE | JSON},
    ),
    "hugging face in parts": Layout(
        sharded, CLIP.from_pretrained,
        {"model.safetensors.index.json": ANY_FILE | JSON | INDEX, "part-1.safetensors": ANY_FILE},
    ),
    "a trained clip": Layout(
        trained, CLIP.from_pretrained, {"model.safetensors": ANY_FILE | SAFETENSORS | CONFIG_IN_HEADER}
    ),
}  # fmt: skip
EACH_NUMBER = "each number 10^9"


def names() -> Iterator[tuple[str, str, str]]:
    """(layout, file, damage) of every case that can be made here."""
    for layout, about in LAYOUTS.items():
        if about.needs is None or importlib.util.find_spec(about.needs) is not None:
            for file, damages in about.files.items():
                yield from ((layout, file, damage) for damage in damages)
                if "all numbers 10^9" in damages and "index" not in file and "tokenizer" not in file:
                    yield layout, file, EACH_NUMBER


class Originals:
    """Good checkpoints, made once and copied for each case."""

    def __init__(self, folder: Path):
        self.folder, self.made = folder, dict[str, tuple[Path, dict[str, Tensor]]]()

    def good(self, layout: str) -> tuple[Path, dict[str, Tensor]]:
        """The path and the loaded weights of the layout's good checkpoint."""
        if layout not in self.made:
            place = self.folder / layout.replace(" ", "_")
            place.mkdir()
            path = LAYOUTS[layout].make(place)
            self.made[layout] = path, LAYOUTS[layout].load(path).state_dict()
        return self.made[layout]

    def copy(self, layout: str, file: str, into: Path) -> tuple[Path, Path]:
        """A copy of the good checkpoint: the path that is loaded, and that of the file in it."""
        good, _ = self.good(layout)
        copy = into / good.name
        if good.is_dir():
            shutil.copytree(good, copy)
            return copy, next(copy.glob(file))
        shutil.copy(good, copy)
        return copy, copy

    def load(self, layout: str, path: Path) -> str:
        """Load a damaged checkpoint: "as good" or "other weights"."""
        _, expected = self.good(layout)
        found = LAYOUTS[layout].load(path).state_dict()
        same = found.keys() == expected.keys() and all(
            torch.equal(found[name], tensor) for name, tensor in expected.items()
        )
        return "as good" if same else "other weights"

    def load_with_each_number(self, layout: str, path: Path, file: Path, value: object) -> str:
        """Load with each number of a JSON file replaced, one at a time; "as good" if none is a fault."""
        config = json.loads(file.read_text())
        for place in number_places(config):
            file.write_text(json.dumps(with_number(config, place, value)))
            try:
                if self.load(layout, path) != "as good":
                    raise AssertionError(f"{place}: other weights")
            except (ValueError, OSError) as error:
                if len(str(error).splitlines()) != 1:
                    raise AssertionError(f"{place}: {error}") from error
            except Exception as error:
                raise AssertionError(f"{place}: {type(error).__name__}: {error}") from error
        return "as good"
