"""Published CLIPs: their sizes, what is inferred from bare tensors, files and folders of all kinds.

The files here are made of our own small models under the others' names, so that nothing else is needed;
test_clip_sources.py asks the others themselves, test_clip_damage.py is about damage.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dalle2_fast import CLIP
from dalle2_fast.checkpoints import CheckpointError
from dalle2_fast.checkpoints.formats.clip_keys import HUGGING_FACE, NATIVE, export
from dalle2_fast.checkpoints.formats.clip_options import from_hugging_face, from_open_clip, from_shapes, ratio
from tests.support.clip_cases import (
    NAMED,
    RESNET,
    SMALL,
    config_of_hugging_face,
    config_of_open_clip,
    small,
    torchscript,
)
from tests.support.tiny_pipeline import tiny_pipeline


def assert_same(one: CLIP, other: CLIP) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    ignored = ("logit_scale_init", "visual_patch_size") if one.config["visual_kind"] == "resnet" else ()
    for name in one.config.keys() - {"logit_scale_init", *ignored}:
        assert one.config[name] == other.config[name], name


# -------------------------------------------------------------------------------------------------- published


@pytest.mark.parametrize("name", NAMED)
def test_published_sizes(name):
    """Parameters of every named model at full size, and the same options from its bare shapes: heads (80 and
    104 wide, too), depths, MLPs, image size."""
    config, count = NAMED[name]
    options = from_open_clip(config, name)
    with torch.device("meta"):
        clip = CLIP(**options)
    assert sum(parameter.numel() for parameter in clip.parameters()) == count
    again = CLIP.__init__.__kwdefaults__ | from_shapes(clip.state_dict(), NATIVE, "both", name)
    for key in options.keys() - {"quick_gelu", "mlp_ratio", "visual_mlp_ratio", "visual_patch_size"}:
        assert again[key] == options[key], key
    if "RN" in name:
        with pytest.raises(ValueError, match="layout: Hugging Face's CLIP has Vision Transformers"):
            export(clip.state_dict(), "huggingface")
    else:
        assert again["visual_patch_size"] == options["visual_patch_size"]
        theirs = clip.to_state_dict("huggingface")
        assert sum(value.numel() for value in theirs.values()) == count
        assert from_shapes(theirs, HUGGING_FACE, "both", name) == from_shapes(
            clip.state_dict(), NATIVE, "both", name
        )


def test_towers_of_karlo():
    """CLIP L/14's two towers as the diffusers folders hold them, without and with the temperature."""
    with torch.device("meta"):
        text, image = CLIP(visual_kind=None), CLIP(text_enc_depth=None)
    counts = [sum(parameter.numel() for parameter in tower.parameters()) - 1 for tower in (text, image)]
    assert counts == [123_650_304, 303_966_208] and sum(counts) + 1 == NAMED["ViT-L-14"][1]


def test_ratio_survives_the_rounding():
    """1664 * (8192 / 1664) is not 8192 for every pair: int() would drop a row of the MLP."""
    for width in range(1, 3000, 7):
        for hidden in (width + 1, 3 * width + 1, 4 * width, 8192):
            assert int(width * ratio(hidden, width)) == hidden


# ------------------------------------------------------------------------------------------ files and folders


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit, with which OpenAI wrote them
@pytest.mark.parametrize("options", [SMALL, RESNET], ids=["ViT", "ResNet"])
def test_openai_s_archives(tmp_path, options):
    """TorchScript: half precision, sizes as buffers. They say by themselves that they are OpenAI's."""
    clip = small(options).half().float()
    sizes = dict(input_resolution=16, context_length=8, vocab_size=60)
    state = {name: value.half() if value.is_floating_point() else value for name, value in
             clip.state_dict().items()} | {name: torch.tensor(value) for name, value in sizes.items()}
    assert_same(CLIP.from_pretrained(torchscript(tmp_path / "RN50.pt", state)), clip)
    torch.save(state, tmp_path / "plain.pt")
    assert_same(CLIP.from_pretrained(tmp_path / "plain.pt"), clip)


@pytest.mark.parametrize("options", [SMALL, RESNET], ids=["ViT", "ResNet"])
def test_bare_files_need_the_activation(tmp_path, options):
    clip = small(options, quick_gelu=False)
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": value for name, value in
                                           clip.state_dict().items()}}, tmp_path / "epoch_1.pt")
    save_file(clip.state_dict(), tmp_path / "model.safetensors")
    apart = {name if name.startswith(("visual", "logit")) else f"text.{name}": value for name, value in
             clip.state_dict().items()}
    torch.save(apart, tmp_path / "apart.pth")
    for name in ("epoch_1.pt", "model.safetensors", "apart.pth"):
        with pytest.raises(CheckpointError, match=f"{name}: .*pass quick_gelu=True .*or False"):
            CLIP.from_pretrained(tmp_path / name)
        assert_same(CLIP.from_pretrained(tmp_path / name, quick_gelu=False), clip)


def test_bare_files_of_unusual_widths_need_the_heads(tmp_path):
    clip = small(dim_text=36, text_heads=3, dim_image=40, visual_heads=5)
    save_file(clip.to_state_dict("huggingface"), tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match="pass text_heads=.*; visual_heads="):
        CLIP.from_pretrained(tmp_path / "clip.safetensors", quick_gelu=True)
    options = dict(quick_gelu=True, text_heads=3, visual_heads=5)
    assert_same(CLIP.from_pretrained(tmp_path / "clip.safetensors", **options), clip)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "what.ever.pt"])
def test_folders_of_hugging_face(tmp_path, name):
    clip = small(image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4))
    state = clip.to_state_dict("huggingface")
    state["text_model.embeddings.position_ids"] = torch.arange(8)[None]  # of old versions
    (save_file if name.endswith("tensors") else torch.save)(state, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(config_of_hugging_face()))
    processor = {"image_processor": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    assert_same(CLIP.from_pretrained(tmp_path), clip)
    assert_same(CLIP.from_pretrained(tmp_path / name), clip)


def test_folders_that_hold_two_layouts(tmp_path):
    """LAION's repositories: the same CLIP twice, with both configurations."""
    clip = small(quick_gelu=False)
    save_file(clip.to_state_dict("huggingface"), tmp_path / "model.safetensors")
    torch.save(clip.to_state_dict("open_clip"), tmp_path / "open_clip_pytorch_model.bin")
    config = config_of_hugging_face()
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = json.dumps({"model_cfg": config_of_open_clip(quick_gelu=False)})
    (tmp_path / "open_clip_config.json").write_text(text)
    for path in (tmp_path, tmp_path / "open_clip_pytorch_model.bin"):
        assert_same(CLIP.from_pretrained(path), clip)


def test_folders_of_timm(tmp_path):
    """There model.safetensors is the image tower under other names, and config.json is timm's."""
    clip = small()
    save_file({"blocks.0.norm1.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file(clip.to_state_dict("open_clip"), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch32_clip_224"}))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config_of_open_clip()}))
    assert_same(CLIP.from_pretrained(tmp_path), clip)


def test_old_configurations_of_hugging_face():
    """What equals a default is left out; *_config_dict overrules *_config; 2 as the end is a mistake."""
    assert from_hugging_face({"model_type": "clip"}, "x")["num_text_tokens"] == 49408
    old = config_of_hugging_face(text_config_dict={"num_attention_heads": 4}, vision_config=None)
    options = from_hugging_face(old, "x")
    assert (options["text_heads"], options["dim_text"], options["dim_image"]) == (4, 64, 768)
    old["text_config"]["eos_token_id"] = 2
    assert from_hugging_face(old, "x")["eos_token_id"] == 59


def test_shards(tmp_path):
    clip = small()
    state = list(clip.to_state_dict("huggingface").items())
    places = {}
    for number, part in enumerate((state[:20], state[20:])):
        save_file(dict(part), tmp_path / f"part-{number}.safetensors")
        places |= {name: f"part-{number}.safetensors" for name, _ in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text(json.dumps(config_of_hugging_face()))
    assert_same(CLIP.from_pretrained(tmp_path), clip)
    index.write_text(json.dumps({"weight_map": places | {"visual.more": "part-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"index.json: its shards lack 1 .*visual.more"):
        CLIP.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.bin"}}))
    with pytest.raises(CheckpointError, match="names of files of tensors in its folder, got '../secret.bin'"):
        CLIP.from_pretrained(tmp_path)


def test_our_own_formats(tmp_path):
    clip = small(quick_gelu=False, image_mean=(0.1, 0.2, 0.3))
    assert_same(CLIP.from_pretrained(clip.save_pretrained(tmp_path / "clip")), clip)
    path = clip.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    half = CLIP.from_pretrained(path, dtype=torch.float64)
    assert half.text_projection.dtype == torch.float64
    pipe = tiny_pipeline()
    assert_same(CLIP.from_pretrained(pipe.save_pretrained(tmp_path / "all")), pipe.clip)
    embedded = CLIP.from_pretrained()
    assert embedded.config["visual_kind"] == "conv_vit" and embedded.config["num_text_tokens"] == 126


def test_what_training_leaves(tmp_path):
    """The finished stage of `dalle2-fast train clip`, which has a stem that no shapes would explain."""
    from dalle2_fast.training.weights import save_weights

    clip = small(visual_kind="conv_vit")
    save_weights(tmp_path / "model.safetensors", {"model": clip.config, "steps": 1}, clip.state_dict())
    assert_same(CLIP.from_pretrained(tmp_path), clip)


def test_dtype_and_options():
    state = torch.get_rng_state()
    clip = CLIP.from_pretrained(dtype=torch.bfloat16, image_std=[1.0, 1.0, 1.0])
    assert clip.image_std == (1.0, 1.0, 1.0) and not clip.training
    assert {value.dtype for value in clip.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in clip.parameters()), "ready for fine-tuning"
    assert not any(parameter.is_meta for parameter in clip.parameters())
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers"
