"""CLIPs that cannot be loaded: what is missing or foreign is named, and nothing in a file is ever run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dalle2_fast import CLIP
from dalle2_fast.checkpoints import CheckpointError, save_folder
from dalle2_fast.checkpoints.formats.clip_options import from_hugging_face, from_open_clip
from dalle2_fast.checkpoints.tensor_files import read_tensors
from tests.support.clip_cases import config_of_hugging_face, config_of_open_clip, small, torchscript

# torch.jit, which writes archives like OpenAI's, is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_names_what_is_missing_left_over_and_misshapen(tmp_path):
    """In the words of the file, whichever layout it has."""
    state = small().to_state_dict("huggingface")
    (tmp_path / "config.json").write_text(json.dumps(config_of_hugging_face()))
    del state["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    state["vision_model.head.weight"] = torch.zeros(2)
    state["visual_projection.weight"] = torch.zeros(24, 127)
    save_file(state, tmp_path / "model.safetensors")
    words = (
        r"model.safetensors: .*missing 1 \(text_model.encoder.layers.1.self_attn.k_proj.weight\); "
        r"left over 1 \(vision_model.head.weight\); "
        r"visual_projection.weight: expected \[24, 128\], got \[24, 127\]"
    )
    with pytest.raises(CheckpointError, match=words):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize("layout", ["open_clip", "huggingface"])
def test_half_a_file(tmp_path, layout):
    """Without a configuration the depth comes from the file; what it lacks elsewhere is still named."""
    state = small().to_state_dict(layout)
    second = "resblocks.1." if layout == "open_clip" else "layers.1."
    part = {name: value for name, value in state.items() if second not in name}
    save_file(part, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"missing .*{second}"):
        CLIP.from_pretrained(tmp_path / "x.safetensors", quick_gelu=True)
    save_file({name: value for name, value in state.items() if "vis" not in name}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="not a CLIP|not a whole CLIP: vision_model.*is missing"):
        CLIP.from_pretrained(tmp_path / "y.safetensors", quick_gelu=True)


@pytest.mark.parametrize("kind", ["both", "text"])
def test_a_checkpoint_of_ours_without_its_temperature(tmp_path, kind):
    """Only Hugging Face's single towers come without it; elsewhere a default would hide the damage."""
    clip = small(visual_kind=None) if kind == "text" else small()
    tensors = {f"clip.{name}": value for name, value in clip.state_dict().items() if name != "logit_scale"}
    save_folder(tmp_path, {"model": "CLIP", "clip": clip.config}, tensors)
    with pytest.raises(CheckpointError, match=r"missing 1 \(logit_scale\)"):
        CLIP.from_pretrained(tmp_path)


def test_what_is_no_clip(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        CLIP.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="expected open_clip_model.*got no file of tensors"):
        CLIP.from_pretrained(tmp_path)
    for name in ("a.bin", "b.bin"):
        torch.save({"embeddings.token_embedding.weight": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="or one file of tensors, got a.bin, b.bin"):
        CLIP.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"a.bin: not a CLIP: .*got 1 \(embeddings.token_embedding"):
        CLIP.from_pretrained(tmp_path / "a.bin")
    for content, words in (([1], "expected a state_dict, got list"), ({"a": 1}, "something else in a")):
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match=words):
            CLIP.from_pretrained(tmp_path / "c.pt")


class Attack:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.system, (f"touch {self.place}",)


@pytest.mark.parametrize("kind", ["torch", "legacy", "torchscript"])
def test_no_file_runs_code(tmp_path, kind):
    """A pickle that calls os.system, in each of the three kinds of file that hold one."""
    trace, file = tmp_path / "ran", tmp_path / "clip.pt"
    if kind == "torchscript":
        torchscript(tmp_path / "good.pt", {"a": torch.ones(1)})
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(file, "w") as bad:
            for name in good.namelist():
                attack = name.endswith("/data.pkl")
                bad.writestr(name, pickle.dumps(Attack(trace), 2) if attack else good.read(name))
    else:
        torch.save({"a": Attack(trace)}, file, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(CheckpointError, match=r"clip.pt: .*asks for \w+.system"):
        CLIP.from_pretrained(file)
    assert not trace.exists()


def test_damaged_archives(tmp_path):
    """Cut short, a storage of another length, a view that reaches outside of its storage."""
    file = torchscript(tmp_path / "x.pt", {"a.b": torch.ones(3, 4), "c": torch.zeros((), dtype=torch.int64)})
    assert read_tensors(file)["a.b"].shape == (3, 4)
    content = file.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="x.pt: (truncated or damaged|damaged or not)"):
            read_tensors(file)

    def rewritten(change) -> Path:
        torchscript(tmp_path / "good.pt", {"a": torch.ones(3, 4)})
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(file, "w") as bad:
            for name in good.namelist():
                bad.writestr(name, change(name, good.read(name)))
        return file

    shorter = rewritten(lambda name, data: data[:-4] if name.endswith("/data/0") else data)
    with pytest.raises(CheckpointError, match="data/0: expected 48 bytes, got 44"):
        read_tensors(shorter)
    outside = rewritten(lambda name, data: data.replace(b"K\x03K\x04", b"K\x03K\x05", 1)
                        if name.endswith("data.pkl") else data)
    with pytest.raises(CheckpointError, match="outside of its 12 numbers|matches"):
        read_tensors(outside)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(vision_cfg={"timm_model_name": "vit"}), "vision_cfg.timm_model_name: expected None, got 'vit'"),
        (dict(vision_cfg={"pool_type": "avg"}), "vision_cfg.pool_type: expected 'tok', got 'avg'"),
        (dict(vision_cfg={"qk_norm": True}), "vision_cfg.qk_norm: expected nothing of that name, got True"),
        (dict(vision_cfg={"image_size": [224, 192]}), "expected squares, got"),
        (dict(text_cfg={"no_causal_mask": True}), "text_cfg.no_causal_mask: expected False, got True"),
        (dict(vision_cfg=None), "expected embed_dim, vision_cfg and text_cfg"),
    ],
)
def test_open_clip_s_that_ours_is_not(change, words):
    with pytest.raises(CheckpointError, match=f"here: .*{words}"):
        from_open_clip(config_of_open_clip(**change), "here")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model_type="siglip"), "model_type: expected one of clip, .*got 'siglip'"),
        (dict(text_config={"hidden_act": "relu"}), "hidden_act: expected quick_gelu or gelu, got 'relu'"),
        (dict(text_config={"hidden_act": "gelu"}), "hidden_act: expected the same for both towers"),
        (dict(vision_config={"layer_norm_eps": 1e-6}), "layer_norm_eps: expected 1e-05, got 1e-06"),
        (dict(vision_config={"num_channels": 4}), "num_channels: expected 3, got 4"),
    ],
)
def test_hugging_face_s_that_ours_is_not(change, words):
    with pytest.raises(CheckpointError, match=f"here: .*{words}"):
        from_hugging_face(config_of_hugging_face(**change), "here")


def test_a_configuration_of_another_clip(tmp_path):
    save_file(small().to_state_dict("huggingface"), tmp_path / "model.safetensors")
    config = config_of_hugging_face()
    config["text_config"]["num_hidden_layers"] = 3
    config["vision_config"]["num_attention_heads"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no CLIP has this configuration \(dim: expected"):
        CLIP.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="missing 16 .*text_model.encoder.layers.2."):
        CLIP.from_pretrained(tmp_path, visual_heads=2)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: damaged, not valid JSON"):
        CLIP.from_pretrained(tmp_path)


def test_towers_of_two_clips(tmp_path):
    for folder, kind, part, more in (
        ("text_encoder", "clip_text_model", small(visual_kind=None), {}),
        ("image_encoder", "clip_vision_model", small(text_enc_depth=None), {"hidden_act": "gelu"}),
    ):
        (tmp_path / folder).mkdir()
        section = "text_config" if "text" in kind else "vision_config"
        config = config_of_hugging_face()[section] | {"model_type": kind, "projection_dim": 24} | more
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        state = part.to_state_dict("huggingface")
        del state["logit_scale"]
        save_file(state, tmp_path / folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="image_encoder differ: quick_gelu is True and False"):
        CLIP.from_pretrained(tmp_path)


def test_wrong_layout():
    with pytest.raises(ValueError, match="layout: expected one of openai, .*huggingface, got 'timm'"):
        small().to_state_dict("timm")
    with pytest.raises(ValueError, match="layout: Hugging Face's CLIP has .*not visual.conv1.0.weight"):
        small(visual_kind="conv_vit").to_state_dict("huggingface")
