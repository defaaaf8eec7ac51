"""What users may import, and what the pickles of earlier versions name, stays where it was."""

from __future__ import annotations

import io
import lzma
from importlib import import_module
from pathlib import Path

import pytest
import torch

from dalle2_fast import DALLE2
from tests.support.tiny_pipeline import tiny_pipeline

PUBLIC = {
    "dalle2_fast": "ARPrior ARPriorNetwork CLIP ClipLoss DALLE2 Decoder DiffusionPrior DiffusionPriorNetwork "
    "GroupNormSiLU SigLipLoss SoftClipLoss UNet Upsampler __version__ build_info keep_freed_memory patch "
    "unpatch",
    "dalle2_fast.functional": "add_noise contrastive_loss conv3x3 cross_attention diffusion_step "
    "group_norm_silu sample_noise sigmoid_loss soft_contrastive_loss",
    "dalle2_fast.reference": "add_noise contrastive_loss conv3x3 cross_attention diffusion_step "
    "group_norm_silu philox_4x32_10 predict_x0 sample_noise sigmoid_loss soft_contrastive_loss",
    "dalle2_fast.modules": "Conv3x3 GroupNormSiLU",
    "dalle2_fast.losses": "ClipLoss SigLipLoss SoftClipLoss",
    "dalle2_fast.diffusion": "SAMPLERS ContinuousSchedule DiscreteSchedule GaussianDiffusion Schedule "
    "inversion_table make_schedule sampler_table step_times",
    "dalle2_fast.models": "ARPrior ARPriorNetwork CLIP DALLE2 Decoder DiffusionPrior DiffusionPriorNetwork "
    "TextTransformer UNet Upsampler",
    "dalle2_fast.models.clip": "CLIP",
    "dalle2_fast.models.decoder": "Decoder",
    "dalle2_fast.models.prior": "DiffusionPrior DiffusionPriorNetwork",
    "dalle2_fast.models.unet": "UNet",
    "dalle2_fast.models.upsampler": "Upsampler",
    "dalle2_fast.pipeline": "DALLE2",
    "dalle2_fast.data": "BPETokenizer NEGATIVE_KINDS PairStream SPLITS SceneStream Tokenizer "
    "WebDatasetStream WordTokenizer World compose draw_phrasing hard_negatives make_captions render "
    "sample_negatives sample_scenes scene_words stated tokenizer_from_config",
    "dalle2_fast.checkpoints": "FORMAT_VERSION Checkpoint CheckpointError Pretrained construct embedded_path "
    "join_states load_config load_folder load_state open_checkpoint reject_leftovers save_folder",
    "dalle2_fast.adapters.patch": "patch unpatch",
    "dalle2_fast.adapters.diffusers": "",
    "dalle2_fast.adapters.dalle2_pytorch": "",
    "dalle2_fast.adapters.published": "Dalle2PytorchDecoder Dalle2PytorchPrior Glide "
    "GuidedDiffusion load_dalle2_pytorch_decoder load_dalle2_pytorch_prior load_glide load_guided_diffusion",
    "dalle2_fast.cli": "main",
}
# A whole pipeline, other networks, results and tokenizers, written with torch.save by version 0.1.0. The
# weights have few different values, so that the file is small.
PICKLES = Path(__file__).with_name("previous_release.pt.xz")


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay(module):
    """Catches: a move after which a documented import fails."""
    missing = [name for name in PUBLIC[module].split() if not hasattr(import_module(module), name)]
    assert not missing


def test_no_public_name_is_unlisted():
    """Catches: a new public name that this list does not protect."""
    for module in ("dalle2_fast", "dalle2_fast.functional", "dalle2_fast.data", "dalle2_fast.models"):
        assert set(import_module(module).__all__) == set(PUBLIC[module].split()), module


@pytest.fixture(scope="module")
def pickled() -> dict:
    return torch.load(io.BytesIO(lzma.decompress(PICKLES.read_bytes())), weights_only=False)


def test_a_pickled_pipeline_samples_as_a_new_one(pickled):
    """Catches: classes that moved, and attributes that a method needs but an older object does not have."""
    old, new = pickled["pipe"], tiny_pipeline().eval()
    assert type(old) is DALLE2 and old.sizes == new.sizes
    new.load_state_dict(old.state_dict())
    made, expected = (pipe.generate("a red ring", 2, seed=0) for pipe in (old, new))
    assert torch.equal(made.images, expected.images) and torch.equal(made.image_embed, expected.image_embed)
    varied, wanted = (pipe.variations(made.images, 1, seed=1) for pipe in (old, new))
    assert torch.equal(varied.images, wanted.images)


def test_other_pickled_objects_work(pickled):
    """Catches: the same in what is not part of that pipeline."""
    assert pickled["generation"].images.shape == (1, 3, 2, 2) and pickled["inversion"].steps == 2
    clip, prior = pickled["clip"], pickled["ar_prior"]
    side = clip.image_size
    assert clip.encode_image(torch.rand(1, 3, side, side)).shape == (1, clip.dim_latent)
    again = type(prior)(**prior.config)
    again.load_state_dict(prior.state_dict())
    assert pickled["pca"].truncate(torch.ones(1, 4, dtype=torch.float64), 2).shape == (1, 4)
    assert pickled["tokenizer"].encode("ab").ndim == 2
    assert pickled["world"] == type(pickled["world"])()
    assert pickled["norm"](torch.rand(1, 4, 2, 2)).shape == (1, 4, 2, 2)
    features = torch.eye(2)
    assert pickled["loss"](features, features, 1.0).ndim == 0
