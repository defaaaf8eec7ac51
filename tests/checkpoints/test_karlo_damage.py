"""Karlo's files that are not right: configs that ask for more, what is missing, cut, renamed, malicious."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dalle2_fast import DALLE2, DiffusionPrior
from dalle2_fast.checkpoints import CheckpointError, open_checkpoint

pytest.importorskip("diffusers", reason="needs diffusers, whose Karlo is the oracle")
pytest.importorskip("transformers", reason="needs transformers, whose CLIP the pipeline uses")

from tests.support import tiny_karlo  # noqa: E402


@pytest.fixture
def copy(karlo_folder, tmp_path) -> Path:
    """A copy of the diffusers folder, to be damaged."""
    return Path(shutil.copytree(karlo_folder, tmp_path / "copy"))


@pytest.mark.parametrize(("name", "says"), [
    ("prior-ckpt-step=01000000-of-01000000.ckpt", "Karlo's prior is missing, published as prior-ckpt"),
    ("ViT-L-14_stats.th", "Karlo's statistics is missing, published as ViT-L-14_stats.th"),
    ("ViT-L-14.pt", "Karlo's clip is missing, published as ViT-L-14.pt; got .*decoder .decoder-ckpt"),
])  # fmt: skip
def test_missing_original_files_are_named(karlo_originals, tmp_path, name, says):
    for file in karlo_originals.iterdir():
        if file.name != name:
            shutil.copy(file, tmp_path)
    with pytest.raises(FileNotFoundError, match=says):
        DALLE2.from_pretrained(tmp_path)


def test_missing_leftover_and_misshapen_original_keys_are_named(karlo_originals, tmp_path):
    file = shutil.copy(karlo_originals / "prior-ckpt-step=01000000-of-01000000.ckpt", tmp_path)
    shutil.copy(karlo_originals / "ViT-L-14_stats.th", tmp_path)
    content = torch.load(file, weights_only=True)
    query = content["state_dict"].pop("model.final_ln.bias")
    content["state_dict"]["model.padding_embedding"] = query
    torch.save(content, file)
    says = r"missing 1 \(model.final_ln.bias\); left over 1 \(model.padding_embedding\)"
    with pytest.raises(CheckpointError, match=says):
        DiffusionPrior.from_pretrained(tmp_path)
    del content["state_dict"]["model.padding_embedding"]
    content["state_dict"]["model.final_ln.bias"] = torch.zeros(5)
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"prior.net.ln_final.bias: expected \[128\], got \[5\]"):
        DiffusionPrior.from_pretrained(tmp_path)


def rewrite(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in (content | changes).items()
                                if value != "DELETE"}))


@pytest.mark.parametrize(("file", "changes", "says"), [
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"},
     "expected _class_name UnCLIPPipeline or UnCLIPImageVariationPipeline, got 'StableDiffusionPipeline'"),
    ("model_index.json", {"safety_checker": ["x", "Y"]}, r"left over 1 \(safety_checker\)"),
    ("prior/config.json", {"norm_in_type": "layer"}, "norm_in_type: .*got 'layer'"),
    ("prior/config.json", {"num_layers": "two"}, "num_layers: expected an integer, got 'two'"),
    ("prior/config.json", {"num_layers": 1}, r"left over 16 \(transformer_blocks.1"),
    ("prior/config.json", {"num_layers": 3}, r"missing 16 \(transformer_blocks.2"),
    ("decoder/config.json", {"only_cross_attention": True}, "only_cross_attention: .*got True"),
    ("decoder/config.json", {"new_option": "x"}, "new_option: this library has no such option.*got 'x'"),
    ("decoder/config.json", {"down_block_types": ["DownBlock2D"] * 2}, "down_block_types: .*got DownBlock2D"),
    ("decoder/config.json", {"up_block_types": ["ResnetUpsampleBlock2D"] * 2}, "mirror image"),
    ("decoder/config.json", {"_class_name": "UNet2DModel"}, "expected _class_name UNet2DConditionModel"),
    ("decoder/config.json", {"cross_attention_dim": 40}, "cross_attention_dim: .*only the value 40; got 48"),
    ("super_res_first/config.json", {"add_attention": True}, "expected an upsampler without attention"),
    ("super_res_last/config.json", {"sample_size": 64}, "sample_size: expected 32 or none, got 64"),
    ("prior_scheduler/scheduler_config.json", {"variance_type": "learned"}, "variance_type: expected one of"),
    ("decoder_scheduler/scheduler_config.json", {"clip_sample_range": 2.0}, "expected 1 for images, got 2.0"),
    ("prior_scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler"}, "UnCLIPScheduler, got 'DDPM"),
    ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act: expected quick_gelu or gelu"),
])  # fmt: skip
def test_what_the_configs_ask_for_and_we_do_not_have_is_named(copy, file, changes, says):
    rewrite(copy / file, **changes)
    with pytest.raises(CheckpointError, match=says):
        DALLE2.from_pretrained(copy)


@pytest.mark.parametrize("name", ["prior", "text_proj", "super_res_last", "tokenizer", "text_encoder"])
def test_missing_folders_of_a_pipeline_are_named(copy, name):
    shutil.rmtree(copy / name)
    with pytest.raises(FileNotFoundError, match=f"a UnCLIPPipeline without the folders {name}"):
        DALLE2.from_pretrained(copy)


def test_missing_and_truncated_weights_are_named(copy):
    file = copy / "decoder" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="decoder/diffusion_pytorch_model.safetensors: truncated"):
        DALLE2.from_pretrained(copy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="decoder: expected diffusion_pytorch_model.safetensors"):
        DALLE2.from_pretrained(copy)


def test_renamed_keys_are_named(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "text_proj" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["embed.weight"] = tensors.pop("embedding_proj.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing 1 \(embedding_proj.weight\); left over 1 \(embed.w"):
        DALLE2.from_pretrained(copy)


@pytest.mark.parametrize("where", ["diffusers", "original", "statistics"])
def test_a_malicious_pickle_is_refused_and_not_run(copy, karlo_originals, tmp_path, where):
    proof, evil = tmp_path / "proof", tiny_karlo.Malicious(tmp_path / "proof")
    if where == "diffusers":
        (copy / "decoder" / "diffusion_pytorch_model.safetensors").unlink()
        torch.save({"conv_in.weight": evil}, copy / "decoder" / "diffusion_pytorch_model.bin")
        path = copy
    else:
        path = Path(shutil.copytree(karlo_originals, tmp_path / "evil"))
        name = "ViT-L-14_stats.th" if where == "statistics" else "improved-sr-ckpt-step=1.2M.ckpt"
        torch.save({"state_dict": {"model_first_steps.out.2.weight": evil}}, path / name)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        DALLE2.from_pretrained(path)
    assert not proof.exists()


def test_an_unknown_folder_says_what_is_known(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    says = "config.json is missing; expected .*UnCLIPPipeline.*dalle2_fast.*.ckpt files, got notes.txt"
    with pytest.raises(FileNotFoundError, match=says):
        open_checkpoint(tmp_path)
