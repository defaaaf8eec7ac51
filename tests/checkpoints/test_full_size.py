"""Karlo at full size, without a number in it: diffusers' own classes and ours on the meta device.

Every tensor of the published configuration finds its place, in both layouts, and the counts are the published
ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dalle2_fast import CLIP, Decoder, DiffusionPrior, Upsampler
from dalle2_fast.checkpoints.formats import diffusers as layout
from dalle2_fast.checkpoints.formats import karlo
from dalle2_fast.checkpoints.formats.clip_options import from_hugging_face

pytest.importorskip("diffusers", reason="needs diffusers, whose Karlo is the oracle")

from tests.support import tiny_karlo  # noqa: E402

CHANNELS = (320, 640, 960, 1280)
COUNTS = {
    "prior": 1_022_030_080, "decoder": 885_439_686, "text_proj": 7_878_400, "super_res_first": 691_579_523,
    "super_res_last": 691_579_523,
}  # fmt: skip


def published() -> dict[str, torch.nn.Module]:
    """The networks of kakaobrain/karlo-v1-alpha, on the meta device."""
    from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    shape = dict(block_out_channels=CHANNELS, layers_per_block=3)
    upsampler = shape | dict(
        in_channels=6, out_channels=3, add_attention=False, down_block_types=("ResnetDownsampleBlock2D",) * 4,
        up_block_types=("ResnetUpsampleBlock2D",) * 4,
    )  # fmt: skip
    with torch.device("meta"):
        return dict(
            prior=PriorTransformer(),
            decoder=UNet2DConditionModel(
                **shape, sample_size=64, in_channels=3, out_channels=6, cross_attention_dim=1536,
                attention_head_dim=64, class_embed_type="identity", resnet_time_scale_shift="scale_shift",
                down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
            ),
            text_proj=UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536),
            super_res_first=UNet2DModel(**upsampler, sample_size=256),
            super_res_last=UNet2DModel(**upsampler),
        )  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    return published()


def same_shapes(config: dict, tensors: dict[str, torch.Tensor], kind: type) -> torch.nn.Module:
    """`kind` of this config, whose tensors must be these."""
    with torch.device("meta"):
        model = kind(**config)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return model


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_diffusers_layout(networks, tmp_path, monkeypatch):
    for name, network in networks.items():
        (tmp_path / name).mkdir()
        network.save_config(tmp_path / name)
        assert size(network) == COUNTS[name]
    monkeypatch.setattr(layout, "find_tensors", lambda folder, names: folder / "weights")
    monkeypatch.setattr(layout, "read_tensors", lambda file: networks[file.parent.name].state_dict())
    prior = same_shapes(*layout.read_prior(tmp_path / "prior"), DiffusionPrior)
    decoder = same_shapes(*layout.read_decoder(tmp_path / "decoder", tmp_path / "text_proj"), Decoder)
    upsampler = same_shapes(
        *layout.read_upsampler(tmp_path / "super_res_first", tmp_path / "super_res_last", 64), Upsampler)
    assert size(prior) + 2 * 768 == COUNTS["prior"]  # the statistics are buffers with us
    assert size(decoder.unet) == COUNTS["decoder"] and size(decoder.text_proj) == COUNTS["text_proj"]
    assert size(upsampler.unet) == COUNTS["super_res_first"]
    assert size(upsampler.last_unet) == COUNTS["super_res_last"]
    # what the classes are by default is what was published
    for name in ("channels", "layers_per_block", "attention_levels", "cross_dim", "embed_dim", "film"):
        with torch.device("meta"):
            assert decoder.unet.config[name] == Decoder().unet.config[name]


def test_original_layout(networks):
    state = dict(networks["prior"].state_dict())
    statistics = tuple(state.pop(name)[0] for name in ("clip_mean", "clip_std"))
    decoder = tiny_karlo.original_decoder(networks["decoder"], networks["text_proj"])
    upsampler = tiny_karlo.original_upsampler(networks["super_res_first"], networks["super_res_last"])
    originals = karlo.Originals(Path("karlo"), {
        "prior": (Path("prior.ckpt"), tiny_karlo.original_prior(state, 20)),
        "decoder": (Path("decoder.ckpt"), decoder), "upsampler": (Path("sr.ckpt"), upsampler),
        "statistics": (Path("stats.th"), statistics),
    })  # fmt: skip
    read = karlo.read_original(originals, ("prior", "decoder", "upsampler"))
    kinds = {"prior": DiffusionPrior, "decoder": Decoder, "upsampler": Upsampler}
    models = {name: same_shapes(*read[name], kind) for name, kind in kinds.items()}
    assert sum(x.numel() for x in originals.found["prior"][1].values()) == COUNTS["prior"] - 1_536
    assert size(models["decoder"]) == COUNTS["decoder"] + COUNTS["text_proj"]
    assert size(models["upsampler"]) == 2 * COUNTS["super_res_first"]


def test_clip_l14():
    """Of the text encoder's config.json in the pipeline, and of both towers."""
    config = json.loads("""{"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
        "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu", "vocab_size": 49408}""")
    with torch.device("meta"):
        text, both = CLIP(**from_hugging_face(config, "config.json")), CLIP()
    assert size(text) == 123_650_304 + 1  # the temperature
    assert size(both.visual) == 303_966_208 and size(both) == 427_616_513
