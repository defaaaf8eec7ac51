"""A pipeline as a checkpoint folder: what is saved samples the same, what does not fit is named."""

from __future__ import annotations

import json

import pytest
import torch

from dalle2_fast import DALLE2
from tests.support.tiny_pipeline import load_on_cpu, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_saved_and_loaded_draws_the_same(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path / "saved")
    state = torch.random.get_rng_state()
    loaded = load_on_cpu(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not loaded.training and loaded.dtype == torch.float32
    assert loaded.sampling == pipe.sampling and loaded.metadata == pipe.metadata
    assert torch.equal(loaded("a red ring", 2, seed=1), pipe("a red ring", 2, seed=1))


def test_saved_in_bfloat16(pipe, tmp_path):
    full = pipe.save_pretrained(tmp_path / "fp32") / "model.safetensors"
    half = pipe.save_pretrained(tmp_path / "bf16", dtype=torch.bfloat16) / "model.safetensors"
    assert half.stat().st_size < 0.7 * full.stat().st_size
    loaded = load_on_cpu(half.parent)
    assert loaded.dtype == torch.float32
    assert pipe.dtype == torch.float32  # saving converts a copy
    torch.testing.assert_close(loaded("a ring", 1, seed=1), pipe("a ring", 1, seed=1), atol=0.1, rtol=0)


def test_without_upsampler(tmp_path):
    loaded = load_on_cpu(tiny_pipeline(upsampler=False).save_pretrained(tmp_path))
    assert loaded.upsampler is None and loaded.sizes == (16,)
    with pytest.raises(ValueError, match="size: expected one of 16, got 32"):
        loaded("a ring", 1, size=32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: config.update(model="GAN"), "model 'DALLE2', got 'GAN'"),
        (lambda config: config.pop("prior"), "config.json: prior: expected an object, got None"),
        (lambda config: config["decoder"].update(hue=1), "config.json: decoder: cannot be built .*hue"),
        (lambda config: config["clip"].update(dim_text=32), r"clip.*expected \[.*32.*\], got \[.*16.*\]"),
        (lambda config: config["clip"].update(text_enc_depth=2), r"missing \d+ \(clip\.transformer.*more"),
        (lambda config: config["prior"]["net"].update(depth=2), r"missing \d+ \(prior\."),
        (lambda config: config.update(upsampler=None), r"belong to no part of the config: \d+ \(upsampler\."),
        (lambda config: config.update(sampling={"sampler": "euler"}), "config.json: sampler"),
        (lambda config: config.update(sampling=3), "config.json"),
        (lambda config: config.update(tokenizer=None), "tokenizer: expected an object"),
    ],
)
def test_config_and_weights_that_disagree(pipe, tmp_path, change, says):
    folder = pipe.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says) as caught:
        DALLE2.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_fewer_layers_than_weights_names_the_leftovers(tmp_path):
    folder = tiny_pipeline().save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["text_encoder"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"left over \d+ \(decoder\.text_encoder"):
        DALLE2.from_pretrained(folder)


def test_checkpoints_from_before_still_load(tmp_path):
    """A folder that names neither the prior's class nor a second upsampler, as written before."""
    pipe = tiny_pipeline()
    folder = pipe.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for name in ("prior_class", "upsampler2"):
        del config[name]
    for name in ("upsampler2_steps", "tile"):
        del config["sampling"][name]
    del config["upsampler"]["sample_tile"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_on_cpu(folder)
    assert loaded.sizes == (16, 32)
    assert torch.equal(loaded("a red ring", 1, seed=1), pipe.eval()("a red ring", 1, seed=1))
