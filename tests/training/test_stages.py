"""The four stages on the `tiny` preset, end to end. Each test names the fault it would catch."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile

import pytest
import torch
from PIL import Image

from dalle2_fast.cli import main
from dalle2_fast.cli.train import export_pipeline, load_initial, train_stage
from dalle2_fast.data import World, render, sample_scenes
from dalle2_fast.evaluation.psnr import psnr
from dalle2_fast.models import CLIP, DALLE2, ARPrior, Decoder, DiffusionPrior, Upsampler
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import STAGES, choose_prior
from dalle2_fast.training.stages.decoder import foreground_weight
from dalle2_fast.training.stages.registry import make_stage
from dalle2_fast.training.stages.upsampler import random_crops
from dalle2_fast.training.weights import load_weights, save_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with all four stages of `tiny` trained by the command line, and the pipeline."""
    out = tmp_path_factory.mktemp("run")
    assert main(["train", "all", "--preset", "tiny", "--out", str(out), "--device", "cpu", "--quiet"]) == 0
    return out


def test_train_all_makes_a_pipeline_that_draws(trained):
    """Catches: stages that do not fit together, weights of the wrong dtype, a world that is not recorded."""
    pipeline = DALLE2.from_pretrained(trained)
    images = pipeline("a red circle", num_images=2, seed=0, steps=2, prior_steps=2)
    assert images.shape == (2, 3, 32, 32)
    config = json.loads((trained / "config.json").read_text())
    assert config["metadata"]["preset"] == "tiny"
    assert World(**config["metadata"]["world"]).shapes == ("circle", "square")
    for stage in STAGES:
        rows = [json.loads(line) for line in (trained / stage / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4]
        assert {"loss", "lr", "grad_norm", "images_per_s", "seconds", "samples"} <= set(rows[0])
    assert "two_way" in rows_of(trained, "clip")[-1]
    assert "psnr_bicubic" in rows_of(trained, "upsampler")[-1]
    assert (trained / "decoder" / "samples" / "step-0000004.png").exists()


def rows_of(out, stage):
    return [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]


def test_the_finished_weights_are_the_average(trained):
    """Catches: publishing the raw weights."""
    for stage in STAGES:
        _, tensors = load_weights(trained / stage / "model.safetensors")
        state = torch.load(trained / stage / "state.pt", weights_only=True)
        assert all(torch.equal(tensors[name], value) for name, value in state["ema"]["average"].items())
        assert any(not torch.equal(tensors[name], value) for name, value in state["model"].items())


def test_resume_skips_what_is_finished(trained, capsys):
    """Catches: training a finished stage once more, or refusing to."""
    arguments = ["train", "all", "--preset", "tiny", "--out", str(trained), "--device", "cpu", "--quiet"]
    before = (trained / "decoder" / "state.pt").stat().st_mtime_ns
    assert main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out.count("already finished, skipped") == 4
    assert (trained / "decoder" / "state.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_paused_stage_continues_bit_identically(trained, tmp_path, stage):
    """Catches: randomness of a model or stream that the step's seed does not reach."""
    (tmp_path / "clip").symlink_to(trained / "clip") if stage != "clip" else None
    preset = PRESETS["tiny"]
    assert train_stage(stage, preset, tmp_path, pause_after=0.0, show_progress=False) == "paused"
    # Then a run that is killed after its second step.
    options = dataclasses.replace(preset.recipe(stage).optimisation, save_steps=2)
    recipe = dataclasses.replace(preset.recipe(stage), optimisation=options)
    preset = dataclasses.replace(preset, **{stage: recipe})
    with pytest.raises(Killed):
        with killed_at(3):
            train_stage(stage, preset, tmp_path, resume=True, show_progress=False)
    state = torch.load(tmp_path / stage / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert train_stage(stage, preset, tmp_path, resume=True, show_progress=False) == "finished"
    _, resumed = load_weights(tmp_path / stage / "model.safetensors")
    _, whole = load_weights(trained / stage / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Killed(BaseException):
    pass


class killed_at:
    """Within the block the trainer's backward of step `step` raises."""

    def __init__(self, step):
        self.step = step

    def __enter__(self):
        from dalle2_fast.training.trainer import Trainer

        self.backward, limit = Trainer._backward, self.step

        def backward(trainer):
            if trainer.state.step >= limit:
                raise Killed
            return self.backward(trainer)

        Trainer._backward = backward

    def __exit__(self, *_):
        from dalle2_fast.training.trainer import Trainer

        Trainer._backward = self.backward


def test_decoder_and_prior_need_clip(tmp_path, capsys):
    """Catches: a traceback, or half a folder left behind."""
    for stage in ("prior", "decoder"):
        arguments = ["train", stage, "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu"]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "clip/model.safetensors not found: first train it: dalle2-fast train clip --out" in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "--preset: expected one of scenes-cpu, scenes-gpu, tiny, got 'huge'"),
        (["--preset", "tiny", "--device", "cuda:99"], "--device: cuda:99 asked for"),
        (["--preset", "tiny", "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--preset", "tiny", "--steps", "0"], "steps: expected a number above 0, got 0"),
        (["--preset", "tiny", "--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    """Catches: tracebacks on the command line."""
    assert main(["train", "clip", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_existing_state_needs_resume_and_unwritable_out(trained, tmp_path, capsys):
    """Catches: silently overwriting a run; finding out late that nothing can be written."""
    arguments = ["train", "clip", "--preset", "tiny", "--device", "cpu", "--quiet", "--out"]
    assert main([*arguments, str(trained)]) == 2
    assert "already holds a training state: add --resume" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert main([*arguments, str(tmp_path / "file")]) == 2
    assert "--out: cannot write to" in capsys.readouterr().err


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
    """Catches: low and high cropped apart, crops that leave the picture, one crop repeated."""
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


def test_psnr():
    """Catches: a mean over the wrong axes."""
    truth = torch.zeros(2, 3, 4, 4)
    assert psnr(truth + 0.1, truth).mean().item() == pytest.approx(20.0, abs=1e-3)
    images = torch.stack([truth[0] + 0.1, truth[0] + 0.01])
    assert psnr(images, truth).mean().item() == pytest.approx(30.0, abs=1e-3)


@pytest.mark.parametrize("name", ["scenes-cpu", "scenes-gpu"])
def test_preset_models_build_and_fit_the_size(name):
    """Catches: a preset whose arguments no model takes, or a pipeline over 40 MB in bf16."""
    preset = PRESETS[name]
    with torch.device("meta"):
        clip = CLIP(**preset.clip.model, num_text_tokens=126, text_seq_len=36)
        widths = dict(embed_dim=clip.dim_latent, text_dim=clip.config["dim_text"], context_length=36)
        prior = dict(preset.prior.model)
        prior["net"] = prior["net"] | widths
        decoder = dict(preset.decoder.model)
        decoder["text_encoder"] = clip.text_tower()
        decoder = Decoder(**decoder, image_embed_dim=clip.dim_latent)
        models = [clip, DiffusionPrior(**prior), decoder, Upsampler(**preset.upsampler.model)]
    assert 2 * sum(p.numel() for model in models for p in model.parameters()) < 40e6


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


def test_own_data(tmp_path, capsys):
    """Catches: text towers of the wrong size, a tokenizer that is not kept, stages on different captions."""
    pytest.importorskip("webdataset")
    shard = tmp_path / "data.tar"
    with tarfile.open(shard, "w") as tar:
        for index, caption in enumerate(["a quiet harbour", "two dogs", "the sea at night", "a red bicycle"]):
            picture = io.BytesIO()
            Image.new("RGB", (40, 32), (60 * index, 90, 200)).save(picture, format="PNG")
            for ending, data in (("png", picture.getvalue()), ("txt", caption.encode())):
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
    pipeline = DALLE2.from_pretrained(export_pipeline(preset, out))
    assert pipeline("two dogs at the harbour", num_images=1, steps=2, prior_steps=2).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="circle"):
        pipeline("a circle", num_images=1)
    (out / "tokenizer.json").unlink()
    with pytest.raises(TrainingError, match="clip was trained on other captions"):
        make_stage("prior", preset, out=out, seed=0, device=torch.device("cpu"))


def test_an_initialised_prior_has_the_statistics_of_its_own_clip(trained, tmp_path):
    """Catches: a prior started from another that standardises by the embeddings of that one's CLIP."""
    config, tensors = load_weights(trained / "prior" / "model.safetensors")
    foreign = tensors | {"clip_mean": tensors["clip_mean"] + 1.0, "clip_std": tensors["clip_std"] * 3.0}
    save_weights(tmp_path / "foreign.safetensors", config, foreign)
    shutil.copytree(trained / "clip", tmp_path / "clip")
    args = ["train", "prior", "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu", "--quiet"]
    assert main([*args, "--init", str(tmp_path / "foreign.safetensors")]) == 0
    _, tuned = load_weights(tmp_path / "prior" / "model.safetensors")
    for name in ("clip_mean", "clip_std"):
        torch.testing.assert_close(tuned[name], tensors[name])


def test_init_and_freeze_tune_one_tower(trained, tmp_path):
    """Catches: --init ignored, a frozen tower that moves (weight decay, Muon), a tuned one that does not."""
    before = load_weights(trained / "clip" / "model.safetensors")[1]
    args = ["train", "clip", "--preset", "tiny", "--out", str(tmp_path), "--quiet", "--device", "cpu"]
    init = ["--init", str(trained / "clip" / "model.safetensors")]
    assert main([*args, *init, "--freeze", "visual."]) == 0
    config, after = load_weights(tmp_path / "clip" / "model.safetensors")
    assert config["freeze"] == ["visual."]
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("visual."), name


def test_init_gives_a_trained_decoder_a_fine_level(trained, tmp_path, capsys):
    """Catches: a fine level that cannot start from a net without one; other weights missing unnoticed."""
    path = trained / "decoder" / "model.safetensors"
    config, weights = load_weights(path)
    fine = dict(patch_size=1, channels=8, layers=1)
    grown = Decoder(**config["model"] | dict(unet=config["model"]["unet"] | dict(fine=fine)))
    load_initial(grown, path)
    assert f"{path} has no unet.fine, which starts fresh" in capsys.readouterr().out
    assert all(torch.equal(grown.state_dict()[name], value) for name, value in weights.items())
    weights.pop("unet.conv_in.bias")
    save_weights(tmp_path / "part.safetensors", config, weights)
    with pytest.raises(TrainingError, match="unet.conv_in.bias"):
        load_initial(grown, tmp_path / "part.safetensors")


@pytest.mark.parametrize(
    "options, message",
    [
        (["clip", "--freeze", "vision"], "no weight begins with 'vision'"),
        (["clip", "--init", "nowhere.safetensors"], "nowhere.safetensors not found"),
        (["all", "--freeze", "visual."], "expected one stage, got all"),
    ],
)
def test_init_and_freeze_errors(options, message, tmp_path, capsys):
    """Catches: a prefix that matches nothing and trains everything, a missing file met with a traceback."""
    assert main(["train", *options, "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------- the other prior, the second upsampler


def test_an_autoregressive_prior_and_a_second_upsampler_join_the_pipeline(trained, tmp_path, capsys):
    """Catches: an option without effect, a class that export forgets, statistics that were never fitted."""
    out = tmp_path / "run"
    for stage in ("clip", "decoder", "upsampler"):
        shutil.copytree(trained / stage, out / stage)
    common = ["--preset", "tiny", "--out", str(out), "--device", "cpu", "--quiet"]
    assert main(["train", "prior", "--prior", "autoregressive", *common]) == 0
    assert main(["train", "upsampler2", *common]) == 0
    assert "cosine" in rows_of(out, "prior")[-1] and "psnr" in rows_of(out, "upsampler2")[-1]
    assert main(["train", "all", "--export", *common]) == 0
    pipeline = DALLE2.from_pretrained(out)
    assert isinstance(pipeline.prior, ARPrior) and pipeline.prior.fitted
    assert pipeline.sizes == (16, 32, 64)
    assert pipeline("a red circle", num_images=2, seed=0, steps=2).shape == (2, 3, 64, 64)


def test_a_resumed_run_knows_its_prior(trained, tmp_path, capsys):
    """Catches: a state that is refused because --prior was not said again, and one that is taken for another
    prior's because it was said wrongly."""
    (tmp_path / "clip").symlink_to(trained / "clip")
    command = ["train", "prior", "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu", "--quiet"]
    assert main([*command, "--prior", "autoregressive", "--pause-after", "0"]) == 0
    assert main([*command, "--resume", "--prior", "diffusion"]) == 2
    assert "cannot resume: its config differs" in capsys.readouterr().err
    assert main([*command, "--resume", "--pause-after", "-1"]) == 2
    assert "--pause-after: expected at least 0, got -1.0" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    config, _ = load_weights(tmp_path / "prior" / "model.safetensors")
    assert config["class"] == "ARPrior"


def test_a_second_upsampler_is_no_part_of_all(trained):
    assert DALLE2.from_pretrained(trained).upsampler2 is None and not (trained / "upsampler2").exists()


@pytest.mark.parametrize("stage, prior", [("prior", "autoregressive"), ("upsampler2", "diffusion")])
def test_the_other_stages_resume_bit_identically(trained, tmp_path, stage, prior):
    """Catches: buckets fitted to other data after a resume, scenes shared with the first upsampler."""
    preset = choose_prior(PRESETS["tiny"], prior)
    for out in ("whole", "paused"):
        (tmp_path / out).mkdir()
        (tmp_path / out / "clip").symlink_to(trained / "clip")
    assert train_stage(stage, preset, tmp_path / "whole", show_progress=False) == "finished"
    assert train_stage(stage, preset, tmp_path / "paused", pause_after=0.0, show_progress=False) == "paused"
    assert train_stage(stage, preset, tmp_path / "paused", resume=True, show_progress=False) == "finished"
    _, whole = load_weights(tmp_path / "whole" / stage / "model.safetensors")
    _, resumed = load_weights(tmp_path / "paused" / stage / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_state_from_before_an_option_resumes(tmp_path):
    """Catches: a run of days that an update with one more option, at its default, refuses to go on with."""
    preset = PRESETS["tiny"]
    assert train_stage("upsampler", preset, tmp_path, pause_after=0.0, show_progress=False) == "paused"
    path = tmp_path / "upsampler" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["model"]["sample_tile"]
    torch.save(state, path)
    assert train_stage("upsampler", preset, tmp_path, resume=True, show_progress=False) == "finished"


def test_presets_without_a_recipe_say_so():
    bare = dataclasses.replace(PRESETS["tiny"], ar_prior=None, upsampler2=None)
    with pytest.raises(ValueError, match="--preset: tiny has no recipe for ar_prior"):
        choose_prior(bare, "autoregressive")
    with pytest.raises(ValueError, match="--preset: tiny has no recipe for upsampler2"):
        bare.recipe("upsampler2")
    with pytest.raises(ValueError, match="--prior: expected one of diffusion, autoregressive, got 'flow'"):
        choose_prior(bare, "flow")


@pytest.mark.parametrize("name", ["scenes-cpu", "scenes-gpu"])
def test_the_other_recipes_build(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        clip = CLIP(**preset.clip.model, num_text_tokens=126, text_seq_len=36)
        net = dict(embed_dim=clip.dim_latent, text_dim=clip.config["dim_text"], context_length=36)
        prior = ARPrior(net=preset.ar_prior.model["net"] | net)
        Upsampler(**preset.upsampler2.model)
    scenes = preset.ar_prior.optimisation.batch_size * preset.ar_prior.data["statistics_batches"]
    assert scenes > 20 * prior.net.num_components
