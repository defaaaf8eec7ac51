"""The stages: batches, weights of pixels, crops, text towers. Each test names the fault it would catch."""

from __future__ import annotations

import dataclasses
import io
import tarfile

import pytest
import torch
from PIL import Image

from dalle2_fast.data import World, render, sample_scenes
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import EXTRA_STAGES, STAGES
from dalle2_fast.training.run import export_pipeline, train_stage
from dalle2_fast.training.stages.base import HELD_OUT_STREAM
from dalle2_fast.training.stages.decoder import foreground_weight
from dalle2_fast.training.stages.registry import STAGE_CLASSES, make_stage
from dalle2_fast.training.stages.upsampler import random_crops
from tests.support.tiny_pipeline import load_on_cpu


def test_names_and_streams_are_unique():
    """Catches: a stage that the command line does not know; two stages that train on the same scenes."""
    assert list(STAGE_CLASSES) == [*STAGES, *EXTRA_STAGES]
    numbers = [stage.stream_number for stage in STAGE_CLASSES.values()]
    assert sorted([*numbers, HELD_OUT_STREAM]) == [1, 2, 3, 4, 5, 6]


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    """Catches: streams with state; stages or held-out batches that share scenes."""
    options = dict(preset=PRESETS["tiny"], out=tmp_path, device=torch.device("cpu"))
    a, b = make_stage("clip", seed=3, **options), make_stage("clip", seed=3, **options)
    a.batch(0)
    assert torch.equal(a.batch(5)["images"][16], b.batch(5)["images"][16])
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert not torch.equal(a.batch(5)["images"][16], a.batch(6)["images"][16])
    assert not torch.equal(a.batch(0)["images"][16], a.held_out["images"][16][:4])
    other = make_stage("clip", seed=4, **options)
    assert not torch.equal(a.batch(5)["images"][16], other.batch(5)["images"][16])


def test_foreground_weight_covers_the_objects():
    """Catches: weights on the background, or objects that get none."""
    scenes = sample_scenes(16, torch.Generator().manual_seed(0), "train", World(**PRESETS["tiny"].world))
    images = render(scenes, 32)
    weight = foreground_weight({"scenes": scenes, "images": {32: images}}, 32, 4.0)
    assert weight.shape == (16, 1, 32, 32)
    assert set(weight.unique().tolist()) == {1.0, 4.0}
    assert 0.02 < (weight > 1).float().mean() < 0.7
    column, row = ((scenes[name][:, 0] * 32).long() for name in ("cx", "cy"))
    assert (weight[torch.arange(16), 0, row, column] == 4.0).all()  # circles and squares are filled
    assert ((weight == 1.0).float().mean((1, 2, 3)) > 0.3).all()
    with pytest.raises(TrainingError, match="foreground_weight: expected 1"):
        foreground_weight({"images": {32: images}}, 32, 4.0)


def test_crops_show_the_same_place():
    """Catches: low and high cropped apart, crops that leave the image, one crop repeated."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    low = torch.stack([rows, columns, torch.zeros(8, 8)]).expand(3, -1, -1, -1).clone()
    low[:, 2] = torch.arange(3.0)[:, None, None]
    high = low.repeat_interleave(4, 2).repeat_interleave(4, 3)
    small, large = random_crops(low, high, 16, 5, torch.Generator().manual_seed(0))
    assert small.shape == (15, 3, 4, 4)
    assert large.shape == (15, 3, 16, 16)
    assert torch.equal(small.repeat_interleave(4, 2).repeat_interleave(4, 3), large)
    assert torch.equal(small[:, 2, 0, 0], torch.arange(3.0).repeat_interleave(5))
    assert len(small[:, :2, 0, 0].unique(dim=0)) > 5


def test_the_upsampler_learns_to_correct_its_decoder(trained):
    """Catches: low images without the decoder's errors, of other scenes, or the same errors in every step."""
    sampled = dict(fraction=0.5, strength=(0.2, 0.4), steps=5, guidance=(1.0, 2.0))
    preset = PRESETS["tiny"]
    recipe = dataclasses.replace(preset.upsampler, data=preset.upsampler.data | dict(sampled=sampled))
    preset = dataclasses.replace(preset, upsampler=recipe)
    stage = make_stage("upsampler", preset, out=trained, seed=0, device=torch.device("cpu"))
    batch, lows = stage.batch(0), []
    for seed in (0, 0, 1):
        lows.append(stage.sample_low(batch, torch.Generator().manual_seed(seed)))
    truth = batch["images"][16]
    assert lows[0].shape == truth.shape and not torch.equal(lows[0], truth)
    assert torch.equal(lows[0], lows[1]) and not torch.equal(lows[0], lows[2])
    stage.loss(batch, torch.Generator().manual_seed(0)).backward()
    assert all(parameter.grad is None for parameter in stage.decoder.parameters())
    assert "samples a part" in stage.why_not_captured()
    assert set(stage.measure().metrics) == {"psnr", "psnr_bicubic"}


def test_a_decoder_can_start_from_clips_text_tower(trained):
    """Catches: a tower that is shared with the frozen CLIP, frozen like it, or not CLIP's at all."""
    preset = PRESETS["tiny"]
    recipe = dataclasses.replace(preset.decoder, model=preset.decoder.model | dict(text_encoder="clip"))
    preset = dataclasses.replace(preset, decoder=recipe)
    stage = make_stage("decoder", preset, out=trained, seed=0, device=torch.device("cpu"))
    tower, clip = stage.model.text_encoder, stage.clip
    text = stage.held_out["tokens"]
    assert torch.equal(tower(text), clip.encode_text(text)[1])
    stage.loss(stage.batch(0), torch.Generator().manual_seed(0)).backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.data_ptr() != clip.state_dict()[name].data_ptr()


def test_a_decoder_without_a_text_tower_reads_clips_encodings(trained):
    """Catches: Karlo's kind of decoder, which no recipe could describe."""
    preset = PRESETS["tiny"]
    recipe = dataclasses.replace(preset.decoder, model=preset.decoder.model | dict(text_encoder=None))
    preset = dataclasses.replace(preset, decoder=recipe)
    stage = make_stage("decoder", preset, out=trained, seed=0, device=torch.device("cpu"))
    loss = stage.loss(stage.batch(0), torch.Generator().manual_seed(0))
    loss.backward()
    assert stage.model.text_encoder is None and loss.isfinite()
    assert all(parameter.grad is None for parameter in stage.clip.parameters())
    assert stage.measure().images.shape[0] == 2 * stage.held_out_size


def test_validation_has_the_loss_of_held_out_data(trained):
    """Catches: a log that does not show overfitting, noise that differs from one validation to the next."""
    for name in (*STAGES, *EXTRA_STAGES):
        stage = make_stage(name, PRESETS["tiny"], out=trained, seed=0, device=torch.device("cpu"))
        stage.model.eval()
        with torch.no_grad():
            first, second = stage.validate().metrics, stage.validate().metrics
            expected = stage.loss(stage.held_out, torch.Generator().manual_seed(0))
        assert first == second
        assert first["val_loss"] == pytest.approx(expected.item(), rel=1e-5), name
        assert name != "decoder" or -100 <= first["clip_score"] <= 100


def test_captions_of_the_user_are_drawn_at_each_validation(trained, tmp_path):
    """Catches: prompts that are ignored, images that depend on the held-out ones, a wrong file found late."""
    def stage(text):
        file = tmp_path / "prompts.txt"
        file.write_text(text)
        options = dict(out=trained, seed=0, device=torch.device("cpu"))
        return make_stage("decoder", PRESETS["tiny"], execution=Execution(sample_prompts=file), **options)

    made = stage("a red circle\n\na blue square\n").measure()
    assert made.images.shape[0] == 2 * 8 + 2 and made.columns == 8
    for wrong in ("\n", "a\n" * 65):
        with pytest.raises(TrainingError, match="--sample-prompts: expected 1 to 64 captions"):
            stage(wrong)


def test_own_data(tmp_path, capsys):
    """Catches: text towers of the wrong size, a tokenizer that is not kept, stages on different captions."""
    pytest.importorskip("webdataset")
    shard = tmp_path / "data.tar"
    with tarfile.open(shard, "w") as tar:
        for index, caption in enumerate(["a quiet harbour", "two dogs", "the sea at night", "a red bicycle"]):
            png = io.BytesIO()
            Image.new("RGB", (40, 32), (60 * index, 90, 200)).save(png, format="PNG")
            for ending, data in (("png", png.getvalue()), ("txt", caption.encode())):
                entry = tarfile.TarInfo(f"{index}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    preset = PRESETS["tiny"]
    out = tmp_path / "out"
    for stage in STAGES:
        options = dict(shards=str(shard), show_progress=False)
        assert train_stage(stage, preset, out, **options) == "finished"
    # Where objects are is known of rendered scenes only.
    assert "foreground_weight 2 is for rendered scenes" in capsys.readouterr().out
    pipeline = load_on_cpu(export_pipeline(preset, out))
    assert pipeline("two dogs at the harbour", num_images=1, steps=2, prior_steps=2).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="circle"):
        pipeline("a circle", num_images=1)
    (out / "tokenizer.json").unlink()
    with pytest.raises(TrainingError, match="clip was trained on other captions"):
        make_stage("prior", preset, out=out, seed=0, device=torch.device("cpu"))
